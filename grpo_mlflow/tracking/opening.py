"""Which MLflow run is written to: one to resume, that of `mlflow run`, or a new one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import mlflow
from mlflow.entities import Run, RunStatus
from mlflow.tracking.context.registry import resolve_tags

from grpo_mlflow import redaction
from grpo_mlflow.config.schema import TrackingConfig
from grpo_mlflow.errors import StoreAway, one_line, redact
from grpo_mlflow.runtime.files import remove_parts
from grpo_mlflow.tracking import ownership, places
from grpo_mlflow.tracking.base import Tracker
from grpo_mlflow.tracking.borders import STORE_ERRORS
from grpo_mlflow.tracking.store import connect, experiment_id, set_failed
from grpo_mlflow.tracking.tracker import MlflowTracker

_KIND = "grpo.kind"
_SETTLE_SECONDS = 10.0  # for what a run that is resumed has kept; the rest is sent while it goes on
Place = tuple[str, str, Mapping[str, str]]  # parent run id, name, tags


def start(
    config: TrackingConfig,
    kind: str,
    resume: str | None = None,
    nested: Place | None = None,
    name: str | None = None,
) -> Tracker:
    """Open the run to write to: the one to resume, else the one that `mlflow run` made, else a new one.

    `nested` is the place of a trial: a new run, never the one that `mlflow run` made. `name` is that of a run without
    `tracking.run_name`; one that somebody has named keeps its name.

    Raises:
        StoreAway: the store cannot be reached, or there is no run to resume.
        UserError: another process works on the run.
    """
    client = connect(config.uri)
    adopted = os.environ.get("MLFLOW_RUN_ID")
    try:
        if resume is not None:
            run = _reopen(client, resume, adopted if not nested else None)
        elif nested:
            run = _below(client, nested, kind)
        elif adopted:
            run = client.get_run(adopted)
        else:
            run = _new(client, config, kind, name)
        with _failed_otherwise(config.uri, run.info.run_id):
            if adopted == run.info.run_id and resume is None:
                ownership.sign(client, run.info.run_id)
                _rename(client, run, config.run_name, name)
            tracker = MlflowTracker(client, run)
            if resume is not None:
                remove_parts(tracker.run_dir)
                tracker.remember()
    except STORE_ERRORS as error:
        raise StoreAway(f"MLflow store {redact(mlflow.get_tracking_uri())}: {one_line(error)}") from error
    with _failed_otherwise(config.uri, tracker.run_id):
        tracker.tags({_KIND: kind, **places.of_this_process(tracker.run_dir)})
        if config.system_metrics:
            tracker.watch_system()
        tracker.settle(_SETTLE_SECONDS)  # so that others see at once what the run is and where
        tracker.hold(resumed=resume is not None)
    return tracker


@contextmanager
def _failed_otherwise(uri: str | None, run_id: str) -> Iterator[None]:
    """Mark the run FAILED if the block raises: nobody else knows of it yet, and it would show as running for ever."""
    try:
        yield
    except BaseException:
        set_failed(uri, run_id)
        raise


def _reopen(client: mlflow.MlflowClient, resume: str, adopted: str | None) -> Run:
    """Take a run and set it back to RUNNING. The one that `mlflow run -P resume=` opened stays and says why.

    It cannot go: `mlflow run` will set its status.
    """
    run = ownership.take(client, resume)
    if adopted and adopted != resume:
        client.update_run(adopted, name=f"resume of {run.info.run_name}")
        client.set_tag(adopted, "mlflow.parentRunId", resume)
        client.set_tag(adopted, "grpo.resumed", resume)
    if places.ENDED in run.data.tags:
        client.delete_tag(resume, places.ENDED)
    client.update_run(resume, status=RunStatus.to_string(RunStatus.RUNNING))  # last, as what failed would leave it so
    return run


def _new(client: mlflow.MlflowClient, config: TrackingConfig, kind: str, name: str | None) -> Run:
    # the tags at once: a run that is killed now can be told for ours, and ended
    tags = {**redaction.without(resolve_tags({})), **ownership.signature(), _KIND: kind}
    given = config.run_name or name
    return client.create_run(experiment_id(client, config.experiment), run_name=given and _one_line(given), tags=tags)


def _rename(client: mlflow.MlflowClient, run: Run, wanted: str | None, otherwise: str | None) -> None:
    """Name the run that `mlflow run` made as `wanted`, or `otherwise` where the name it has was drawn by MLflow."""
    name = wanted or (otherwise if _is_drawn(run.info.run_name or "") else None)
    if name:
        client.update_run(run.info.run_id, name=_one_line(name))


def _is_drawn(name: str) -> bool:
    """Return whether MLflow has drawn a name, such as `caring-gnu-827`."""
    try:
        from mlflow.utils.name_utils import _GENERATOR_NOUNS, _GENERATOR_PREDICATES
    except ImportError:  # a version that keeps its words elsewhere: then a name stays
        return False
    predicate, _, rest = name.partition("-")
    noun, _, number = rest.rpartition("-")
    return predicate in _GENERATOR_PREDICATES and noun in _GENERATOR_NOUNS and number.isdecimal()


def _one_line(name: str) -> str:
    """Return a name without secrets, and on one line."""
    return " ".join(redact(name).split())


def _below(client: mlflow.MlflowClient, place: Place, kind: str) -> Run:
    parent_id, name, own = place
    parent = client.get_run(parent_id)
    tags = redaction.without({**resolve_tags({}), **own})
    tags |= {**ownership.signature(), "mlflow.parentRunId": parent_id, _KIND: kind}
    return client.create_run(parent.info.experiment_id, run_name=_one_line(name), tags=tags)
