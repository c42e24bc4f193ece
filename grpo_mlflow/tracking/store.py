"""The MLflow store: connecting to it, and reading what runs have left."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # else one call to a store that is away takes minutes
_TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
os.environ.setdefault(_TIMEOUT, "10")
# Else MLflow itself prints the store's address at the end of each run, with its password.
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

import mlflow
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS
from mlflow.utils.uri import is_local_uri

from grpo_mlflow.errors import StoreAway, UserError, one_line, redact
from grpo_mlflow.tracking import borders
from grpo_mlflow.tracking.borders import STORE_ERRORS

_TRANSFER_SECONDS = 600
log = logging.getLogger(__name__)


def connect(uri: str | None = None) -> mlflow.MlflowClient:
    """Return a client of the store: `uri`, else MLFLOW_TRACKING_URI, else mlflow.db in the current folder.

    Raises:
        ConfigError: it is no address.
        StoreAway: its database does not answer.
        UserError: MLflow cannot use it.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        here = str(Path.cwd()).replace("%", "%25")  # as an address has it
        uri = f"sqlite:///{here}/{uri.removeprefix('sqlite:///')}"  # else it breaks in another folder
    borders.require_address(uri)
    borders.require_database(uri)
    try:
        mlflow.set_tracking_uri(uri)
        return mlflow.MlflowClient()
    except STORE_ERRORS as error:
        raise borders.unusable(uri, error) from error


def address() -> str:
    """Return the address of the store that was connected to last."""
    return str(mlflow.get_tracking_uri())


class _Transfers:
    """The transfers of all threads: the time limit, which MLflow reads from the environment, is that of all."""

    lock, count, before = threading.Lock(), 0, ""


@contextlib.contextmanager
def transfer() -> Iterator[None]:
    """Wait for answers inside the block as long as a file takes: a server gives one only when it has passed it on."""
    with _Transfers.lock:
        if _Transfers.count == 0:
            _Transfers.before = os.environ[_TIMEOUT]
            os.environ[_TIMEOUT] = str(max(_TRANSFER_SECONDS, int(_Transfers.before)))
        _Transfers.count += 1
    try:
        yield
    finally:
        with _Transfers.lock:
            _Transfers.count -= 1
            if _Transfers.count == 0:
                os.environ[_TIMEOUT] = _Transfers.before


def find_run(client: mlflow.MlflowClient, run_id: str) -> Run:
    """Return the run.

    Raises:
        UserError: there is no such run.
        StoreAway: the store cannot be reached.
    """
    store = f"MLflow store {redact(mlflow.get_tracking_uri())}"
    try:
        return client.get_run(run_id)
    except STORE_ERRORS as error:
        if getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST":
            raise UserError(
                f"run {run_id}: is not in the {store}; allowed: a run of it, or as tracking.uri (MLFLOW_TRACKING_URI) "
                "the store that has this one, such as the mlflow.db of the folder it was started in"
            ) from error
        raise StoreAway(f"{store}: {one_line(error)}") from error


def artifact(client: mlflow.MlflowClient, run_id: str, name: str) -> Path:
    """Return a local path of an artifact, downloading it where the store is not a local folder.

    Raises:
        UserError: there is no such run or artifact.
        StoreAway: the store cannot be reached, or does not give it.
    """
    run = find_run(client, run_id)
    try:
        local = local_path(run.info.artifact_uri)
        with transfer():
            path = local / name if local else Path(client.download_artifacts(run_id, name))
    except STORE_ERRORS as error:
        folder, _, last = name.rpartition("/")
        if last in (Path(entry.path).name for entry in _entries(client, run_id, folder)):
            raise StoreAway(f"run {run_id}: {name}: {one_line(error)}") from error
        raise UserError(f"run {run_id}: has no artifact {name}") from error
    if not path.exists():
        raise UserError(f"run {run_id}: has no artifact {name}")
    return path


def has_artifact(client: mlflow.MlflowClient, run_id: str, name: str) -> bool:
    """Return whether the store, and not only this machine, has a file of a run.

    Raises:
        StoreAway: the store cannot be reached.
    """
    return name in (entry.path for entry in _entries(client, run_id, name.rpartition("/")[0]))


def upload_folder(run_id: str) -> Path:
    """Return where the files of a run are kept before they are sent, where the store is no local folder."""
    return Path("outputs").absolute() / run_id


def lives(client: mlflow.MlflowClient, run_id: str) -> bool:
    """Return whether the store has the run and nobody has deleted it (which is to be undone until `mlflow gc`).

    Raises:
        StoreAway: the store cannot be reached.
    """
    try:
        return bool(find_run(client, run_id).info.lifecycle_stage == "active")
    except StoreAway:
        raise
    except UserError:
        return False


def folders(client: mlflow.MlflowClient, run_id: str, name: str) -> list[str]:
    """Return the names of the folders inside an artifact folder, sorted."""
    return sorted(Path(entry.path).name for entry in _entries(client, run_id, name) if entry.is_dir)


def files(client: mlflow.MlflowClient, run_id: str, name: str) -> list[str]:
    """Return the names of the files inside an artifact folder, sorted."""
    return sorted(Path(entry.path).name for entry in _entries(client, run_id, name) if not entry.is_dir)


def _entries(client: mlflow.MlflowClient, run_id: str, name: str) -> Iterable[Any]:
    find_run(client, run_id)
    try:
        return list(client.list_artifacts(run_id, name))
    except STORE_ERRORS as error:
        raise StoreAway(f"run {run_id}: {name}: {one_line(error)}") from error


def child(client: mlflow.MlflowClient, parent_run_id: str, tag: str, value: str) -> str | None:
    """Return the newest nested run of a parent with a tag, or None.

    Raises:
        StoreAway: the store does not answer.
    """
    wanted = f"tags.`mlflow.parentRunId` = '{parent_run_id}' and tags.`{tag}` = '{value}'"
    try:
        parent = client.get_run(parent_run_id)
        found = client.search_runs([parent.info.experiment_id], wanted, max_results=1)
    except STORE_ERRORS as error:
        raise StoreAway(f"run {parent_run_id}: {one_line(error)}") from error
    return str(found[0].info.run_id) if found else None


def end_abandoned(client: mlflow.MlflowClient, parent_run_id: str) -> None:
    """Mark the nested runs that still show as running FAILED: their processes are gone, and nothing continues them."""
    children = f"tags.`mlflow.parentRunId` = '{parent_run_id}' and attributes.status = 'RUNNING'"
    try:
        parent = client.get_run(parent_run_id)
        for run in client.search_runs([parent.info.experiment_id], children):
            if "grpo.resumed" in run.data.tags:  # of `mlflow run`, which is still at it
                continue
            client.set_terminated(run.info.run_id, "FAILED")
            client.set_tag(run.info.run_id, "grpo.ended", "FAILED")
    except STORE_ERRORS as error:  # the end of a study does not depend on it
        log.warning("MLflow is away, so runs that died may still show as running: %s", one_line(error))


def discard(uri: str | None, run_id: str, run_dir: Path) -> bool:
    """Delete a run of this process and its files; return False if it stays: `mlflow run` opened it, or it refuses."""
    if os.environ.get("MLFLOW_RUN_ID") == run_id:
        return False
    try:
        connect(uri).delete_run(run_id)
    except (UserError, *STORE_ERRORS) as error:
        log.warning("run %s stays: %s", run_id, one_line(error))
        return False
    shutil.rmtree(run_dir, ignore_errors=True)
    return True


def set_failed(uri: str | None, run_id: str) -> None:
    """Mark a run FAILED whose own process is gone; without a word where the store is away."""
    with contextlib.suppress(UserError, *STORE_ERRORS):
        client = connect(uri)
        client.set_tag(run_id, "grpo.ended", "FAILED")
        client.set_terminated(run_id, "FAILED")


def local_path(uri: str) -> Path | None:
    return Path(local_file_uri_to_path(uri)).absolute() if is_local_uri(uri) else None


def listed_tables(tags: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the tables of a run that the UI lists, from its tags."""
    try:
        return list(json.loads(tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]")))
    except ValueError:  # cut off by MLflow, in a run of an older version
        return []


def experiment_id(client: mlflow.MlflowClient, name: str) -> str:
    """Return the experiment's id, creating it first where there is none.

    With an sqlite store its artifacts go beside the database, wherever we were started.
    """
    if client.get_experiment_by_name(name) is None:
        try:
            client.create_experiment(name, borders.artifact_folder(mlflow.get_tracking_uri(), name))
        except MlflowException as error:
            if client.get_experiment_by_name(name) is None:  # else another process was first
                raise borders.refusal(name, error) from error
    found = client.get_experiment_by_name(name)
    if found.lifecycle_stage != "active":
        raise UserError(
            f"tracking.experiment = {name!r}: was deleted in MLflow; allowed: another name, or after "
            f"`mlflow experiments restore --experiment-id {found.experiment_id}` this one"
        )
    return str(found.experiment_id)
