"""Which MLflow run is written to: one to resume, that of `mlflow run`, or a new one."""

from __future__ import annotations

import os
from collections.abc import Mapping

import mlflow
from mlflow.entities import Run, RunStatus
from mlflow.tracking.context.registry import resolve_tags

from grpo_mlflow import redaction
from grpo_mlflow.config.schema import TrackingConfig
from grpo_mlflow.errors import StoreAway, one_line, redact
from grpo_mlflow.tracking.base import Tracker
from grpo_mlflow.tracking.store import STORE_ERRORS, connect, experiment_id
from grpo_mlflow.tracking.tracker import MlflowTracker

Place = tuple[str, str, Mapping[str, str]]  # parent run id, name, tags


def start(config: TrackingConfig, kind: str, resume: str | None = None, nested: Place | None = None) -> Tracker:
    """Open the run to write to: the one to resume, else the one that `mlflow run` made, else a new one.

    `nested` is the place of a trial: a new run, never the one that `mlflow run` made.

    Raises:
        StoreAway: the store cannot be reached, or there is no run to resume.
    """
    client = connect(config.uri)
    adopted = os.environ.get("MLFLOW_RUN_ID")
    try:
        if resume is not None:
            run = _reopen(client, resume, adopted if not nested else None)
        elif nested:
            run = _below(client, nested)
        elif adopted:
            run = client.get_run(adopted)
        else:
            run = client.create_run(
                experiment_id(client, config.experiment),
                run_name=config.run_name,
                tags=redaction.without(resolve_tags({})),
            )
        if resume is None and nested is None and config.run_name:
            client.update_run(run.info.run_id, name=config.run_name)
        tracker = MlflowTracker(client, run)
        if resume is not None:
            tracker.remember()
    except STORE_ERRORS as error:
        raise StoreAway(f"MLflow store {redact(mlflow.get_tracking_uri())}: {one_line(error)}") from error
    tracker.tags({"grpo.kind": kind})
    if config.system_metrics:
        tracker.watch_system()
    return tracker


def _reopen(client: mlflow.MlflowClient, resume: str, adopted: str | None) -> Run:
    """Set a run back to RUNNING. The one that `mlflow run -P resume=` opened stays and says why.

    It cannot go: `mlflow run` will set its status.
    """
    run = client.get_run(resume)
    client.update_run(resume, status=RunStatus.to_string(RunStatus.RUNNING))
    if adopted and adopted != resume:
        client.update_run(adopted, name=f"resume of {run.info.run_name}")
        client.set_tag(adopted, "mlflow.parentRunId", resume)
        client.set_tag(adopted, "grpo.resumed", resume)
    return run


def _below(client: mlflow.MlflowClient, place: Place) -> Run:
    parent_id, name, own = place
    parent = client.get_run(parent_id)
    tags = {**redaction.without({**resolve_tags({}), **own}), "mlflow.parentRunId": parent_id}
    return client.create_run(parent.info.experiment_id, run_name=name, tags=tags)
