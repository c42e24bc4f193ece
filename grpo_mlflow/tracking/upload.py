"""Sending what runs have kept while MLflow was away, when their processes have ended."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow.entities import Run
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from grpo_mlflow.errors import StoreAway, UserError, one_line
from grpo_mlflow.tracking import ownership
from grpo_mlflow.tracking.borders import STORE_ERRORS
from grpo_mlflow.tracking.operation import Destination
from grpo_mlflow.tracking.operations import Publish
from grpo_mlflow.tracking.outbox import SPOOL, Outbox
from grpo_mlflow.tracking.places import run_folder
from grpo_mlflow.tracking.store import connect, find_run, local_path, upload_folder

_SLICE_SECONDS = 1.0  # between two, a signal ends it


@dataclass(frozen=True, slots=True)
class Upload:
    """What became of the operations that a run had kept; `error` is a line on why some still wait."""

    run_id: str
    sent: int
    left: int
    error: str | None = None


def destination(client: mlflow.MlflowClient, run: Run, run_dir: Path) -> Destination:
    return Destination(client, run.info.run_id, run_dir, get_artifact_repository(run.info.artifact_uri))


def send_kept(uri: str | None, run_id: str) -> Upload | None:
    """Send what a run has kept on this machine; None if it has kept nothing.

    Raises:
        UserError: there is no such run.
        StoreAway: the store cannot be reached.
    """
    folder = run_folder(find_run(connect(uri), run_id))
    return _send(uri, run_id, folder) if (folder / SPOOL).exists() else None


def send_kept_below(uri: str | None, parent_run_id: str) -> Iterator[Upload]:
    """Send what the nested runs of a parent have kept on this machine.

    Raises:
        UserError: there is no such parent.
        StoreAway: the store cannot be reached.
    """
    client, token = connect(uri), None
    experiment = find_run(client, parent_run_id).info.experiment_id
    children = f"tags.`mlflow.parentRunId` = '{parent_run_id}'"
    while True:
        try:
            page = client.search_runs([experiment], children, page_token=token)
        except STORE_ERRORS as error:
            raise StoreAway(f"run {parent_run_id}: {one_line(error)}") from error
        for run in page:
            if (run_folder(run) / SPOOL).exists():
                yield _send(uri, run.info.run_id, run_folder(run))
        if not (token := page.token):
            return


def send_file(uri: str | None, run_id: str, name: str) -> None:
    """Make a file of the run folder an artifact of a run that no process works on.

    Raises:
        UserError: there is no such run.
        StoreAway: the store cannot be reached.
    """
    client = connect(uri)
    run = find_run(client, run_id)
    if local_path(run.info.artifact_uri) is not None:  # it is one already
        return
    try:
        Publish(name).send(destination(client, run, run_folder(run)))
    except STORE_ERRORS as error:
        raise StoreAway(f"run {run_id}: {name}: {one_line(error)}") from error


def kept_file(run_id: str, name: str) -> Path | None:
    """Return a file of a run that this machine has and that may not have been sent yet; None if there is none."""
    folder = upload_folder(run_id)
    return folder / name if (folder / SPOOL).exists() and (folder / name).is_file() else None


def upload(uri: str | None, folder: Path) -> Iterator[Upload]:
    """Send what all runs below a folder have kept."""
    for path in sorted(folder.rglob(SPOOL)):
        home = path.parent
        yield _send(uri, home.parent.name if home.name == "artifacts" else home.name, home)


def _send(uri: str | None, run_id: str, folder: Path) -> Upload:
    client = connect(uri)
    try:
        run = find_run(client, run_id)
        outbox = Outbox(destination(client, run, folder))
    except (UserError, *STORE_ERRORS) as error:
        return Upload(run_id, 0, 0, one_line(error))
    kept, why = len(outbox.waiting()), None
    try:
        ownership.take(client, run_id)  # its own process may be at it
        while outbox.waits() and why is None:
            why = outbox.replay(_SLICE_SECONDS)
        ownership.release(client, run_id)
    except (UserError, *STORE_ERRORS) as error:
        why = error
    left = len(outbox.waiting())
    return Upload(run_id, kept - left, left, one_line(why) if why else None)
