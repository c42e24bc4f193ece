"""Writing to MLflow.

Files of a run are written into its run folder. Where the artifact store is a local folder that is the run folder, and
writing is logging; else files are uploaded. Every write to MLflow is an operation that can be repeated: if the store is
away, operations go to `spool.jsonl` in the run folder in order, training goes on, and they are replayed as soon as the
store answers, at the latest when the run is resumed.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Metric, Param, Run, RunStatus, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS
from pydantic_core import to_jsonable_python

from grpo_mlflow.config.schema import TrackingConfig
from grpo_mlflow.errors import StoreAway, one_line, redact
from grpo_mlflow.runtime import interrupts
from grpo_mlflow.tracking.spool import Spool
from grpo_mlflow.tracking.store import (
    STORE_ERRORS,
    connect,
    experiment_id,
    listed_tables,
    local_path,
    register,
    transfer,
    upload_folder,
)

_RETRY_SECONDS = 30.0
_FLUSH_SECONDS = 5.0  # a call to a store costs as much for one step as for many
_TABLES = 80  # that the UI lists: a tag takes 8000 characters
_NEVER = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE")
Place = tuple[str, str, Mapping[str, str]]  # parent run id, name, tags
log = logging.getLogger(__name__)


class NullTracker:
    """Tracks nothing: for all processes but the first."""

    run_id = ""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def params(self, values: Mapping[str, Any]) -> None:
        pass

    def tags(self, values: Mapping[str, str]) -> None:
        pass

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        pass

    def flush(self) -> None:
        pass

    def text(self, name: str, content: str) -> None:
        pass

    def table(self, name: str, columns: Mapping[str, list[Any]]) -> None:
        pass

    def publish(self, name: str) -> None:
        pass

    def remove(self, name: str) -> None:
        pass

    def register(self, name: str, alias: str, run_id: str, artifact: str, tags: Mapping[str, str]) -> None:
        pass

    def finish(self, status: str) -> None:
        pass


class Tracker(NullTracker):
    """Writes to one MLflow run. No method raises because the store is away."""

    def __init__(self, client: mlflow.MlflowClient, run: Run) -> None:
        self._client, self.run_id = client, run.info.run_id
        self.url = mlflow.get_tracking_uri()
        local = local_path(run.info.artifact_uri)
        self._uploads = local is None
        super().__init__(local or upload_folder(self.run_id))
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._spool = Spool(self.run_dir / "spool.jsonl")
        self._retry_at = self._flush_at = self._pause = 0.0
        self._points: list[list[Any]] = []
        self._logged: dict[int, set[tuple[str, float]]] = {}
        tags = dict(run.data.tags)
        for kind, *values in self._spool.read():
            tags |= values[0] if kind == "tags" else {}
        self._tables = listed_tables(tags)
        self._monitor: SystemMetricsMonitor | None = None
        self._artifacts = get_artifact_repository(run.info.artifact_uri)

    def params(self, values: Mapping[str, Any]) -> None:
        """Log parameters that the run lacks; `mlflow run` has logged some of them in its own spelling."""
        self._do("params", {key: redact(str(value)) for key, value in values.items()})

    def tags(self, values: Mapping[str, str]) -> None:
        self._do("tags", dict(values))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log all values at one step, unless a run before its resume logged the same.

        They are sent together with those of other steps, within seconds and before anything else is written.
        """
        if any(item in self._logged.get(step, ()) for item in values.items()):
            return
        allowed = {re.sub(r"[^\w\-. :/]", "_", name): value for name, value in values.items()}
        self._points.append([allowed, step, int(time.time() * 1000)])
        if time.monotonic() >= self._flush_at or self._spool.waits():  # while the store is away, the disk is safer
            self.flush()

    def remember(self) -> None:
        """Take note of the curves that the run has, so that a resume that repeats steps gives one continuous curve.

        Steps are recognised by their loss or pass@1; where repetition is not exact both points are kept.
        """
        for key in ("train/loss_total", "eval/pass_at_1"):
            for point in self._client.get_metric_history(self.run_id, key):
                self._logged.setdefault(point.step, set()).add((key, point.value))

    def text(self, name: str, content: str) -> None:
        """Write a file of the run and publish it."""
        self._path(name).write_text(redact(content))
        self.publish(name)

    def table(self, name: str, columns: Mapping[str, list[Any]]) -> None:
        """Write columns as a table of the run, which the UI lists among its newest ones.

        It is what `log_table` would leave, but written again it is replaced, not lengthened, and the list never
        outgrows a tag, which MLflow cuts off and then cannot read.
        """
        path = self._path(name)
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        data = to_jsonable_python({"columns": list(columns), "data": rows}, inf_nan_mode="null", fallback=str)
        path.write_text(json.dumps(data))
        self.publish(name)
        entry = {"path": name, "type": "table"}
        self._tables = [*(table for table in self._tables if table != entry), entry][-_TABLES:]
        self.tags({MLFLOW_LOGGED_ARTIFACTS: json.dumps(self._tables)})

    def publish(self, name: str) -> None:
        """Upload a file or folder of the run folder, where the store is not that folder itself."""
        if self._uploads:
            self._do("publish", name)

    def remove(self, name: str) -> None:
        """Delete an artifact that was published."""
        if self._uploads:
            self._do("remove", name)

    def register(self, name: str, alias: str, run_id: str, artifact: str, tags: Mapping[str, str]) -> None:
        """Make an artifact of a run the newest version of a registered model, and let the alias name it."""
        self._do("register", name, alias, run_id, artifact, dict(tags))

    def watch_system(self) -> None:
        """Log CPU, memory and GPU use in the background until the run ends."""
        self._monitor = SystemMetricsMonitor(self.run_id, resume_logging=True)
        self._monitor.start()

    def finish(self, status: str) -> None:
        """Set the final status: FINISHED, FAILED or KILLED."""
        if self._monitor is not None:
            self._monitor.finish()
        if self._pause <= _RETRY_SECONDS:  # else another try would take minutes
            self._retry_at = 0.0
        self.tags({"grpo.ended": status})  # `mlflow run` overwrites the status itself with FINISHED or FAILED
        self._do("status", status)
        if self._spool.waits():
            log.warning("MLflow is away: resume=%s sends what is kept in %s", self.run_id, self._spool.path)

    def _path(self, name: str) -> Path:
        path = self.run_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _do(self, *operation: Any) -> None:
        self.flush()
        self._perform(*operation)

    @interrupts.deferred()
    def flush(self) -> None:
        """Send the metrics that wait."""
        if self._points:
            points, self._points = self._points, []
            self._perform("metrics", points)
        self._flush_at = time.monotonic() + _FLUSH_SECONDS

    @interrupts.deferred()  # the store's client may take a signal for an error of the store, or the spool lose a line
    def _perform(self, *operation: Any) -> None:
        pending = self._spool.read()
        waiting, began = [*pending, list(operation)], time.monotonic()
        if not pending or time.monotonic() >= self._retry_at:
            try:
                while waiting:
                    self._send_or_set_aside(waiting[0])
                    waiting.pop(0)
            except STORE_ERRORS as error:
                self._pause = max(_RETRY_SECONDS, time.monotonic() - began)
                self._retry_at = time.monotonic() + self._pause
                if not pending:
                    log.warning("MLflow is away, keeping its data in %s: %s", self._spool.path, one_line(error))
            else:
                self._spool.clear()
                return
        self._spool.append(operation)

    def _send_or_set_aside(self, operation: list[Any]) -> None:
        """Perform an operation; one that the store will never take must not hold up those behind it."""
        try:
            self._send(*operation)
        except Exception as error:  # of MLflow's own mistakes, too, training must not end
            if isinstance(error, STORE_ERRORS) and getattr(error, "error_code", None) not in _NEVER:
                raise
            if operation[0] in ("publish", "remove"):  # the client of an object store has errors of its own
                raise MlflowException(one_line(error)) from error
            log.warning("MLflow refuses %s, kept in refused.jsonl: %s", operation[0], one_line(error))
            with (self.run_dir / "refused.jsonl").open("a") as stream:
                stream.write(json.dumps(operation) + "\n")

    def _send(self, kind: str, *values: Any) -> None:
        """Perform one operation; repeating one changes nothing."""
        client, run_id = self._client, self.run_id
        if kind == "params":
            known = client.get_run(run_id).data.params
            absent = [Param(key, value) for key, value in values[0].items() if key not in known]
            for start in range(0, len(absent), 100):
                client.log_batch(run_id, params=absent[start : start + 100])
        elif kind == "tags":
            client.log_batch(run_id, tags=[RunTag(key, value) for key, value in values[0].items()])
        elif kind == "metrics":
            points = [Metric(key, value, at, step) for named, step, at in values[0] for key, value in named.items()]
            for start in range(0, len(points), 1000):
                client.log_batch(run_id, metrics=points[start : start + 1000])
        elif kind == "publish":
            path = self.run_dir / values[0]
            client.get_run(run_id)  # a store that is away says so sooner here
            with transfer():
                if path.is_dir():
                    self._artifacts.log_artifacts(str(path), values[0])
                elif path.exists():  # it may have been pruned while the store was away
                    parent = str(Path(values[0]).parent)
                    self._artifacts.log_artifact(str(path), None if parent == "." else parent)
        elif kind == "register":
            register(client, *values)
        elif kind == "remove":
            self._artifacts.delete_artifacts(values[0])
        elif kind == "status":
            client.set_terminated(run_id, values[0])
        else:
            raise ValueError(f"no operation {kind!r}")


def start(
    config: TrackingConfig,
    kind: str,
    resume: str | None = None,
    nested: Place | None = None,
) -> Tracker:
    """Open the run to write to: the one to resume, else the one that `mlflow run` made, else a new one.

    `nested` is the place of a trial: a new run, never the one that `mlflow run` made.

    Raises:
        StoreAway: the store cannot be reached, or there is no run to resume.
    """
    client = connect(config.uri)
    adopted = os.environ.get("MLFLOW_RUN_ID")
    try:
        if resume is not None:
            run = client.get_run(resume)
            client.update_run(resume, status=RunStatus.to_string(RunStatus.RUNNING))
            if adopted and adopted != resume and not nested:
                # `mlflow run -P resume=` opened a run of its own and will set its status: it stays, and says why
                client.update_run(adopted, name=f"resume of {run.info.run_name}")
                client.set_tag(adopted, "mlflow.parentRunId", resume)
                client.set_tag(adopted, "grpo.resumed", resume)
        elif nested:
            parent = client.get_run(nested[0])
            tags = {**resolve_tags({}), **nested[2], "mlflow.parentRunId": nested[0]}
            run = client.create_run(parent.info.experiment_id, run_name=nested[1], tags=tags)
        elif adopted:
            run = client.get_run(adopted)
        else:
            run = client.create_run(
                experiment_id(client, config.experiment), run_name=config.run_name, tags=resolve_tags({})
            )
        if resume is None and nested is None and config.run_name:
            client.update_run(run.info.run_id, name=config.run_name)
        tracker = Tracker(client, run)
        if resume is not None:
            tracker.remember()
    except STORE_ERRORS as error:
        raise StoreAway(f"MLflow store {redact(mlflow.get_tracking_uri())}: {one_line(error)}") from error
    tracker.tags({"grpo.kind": kind})
    if config.system_metrics:
        tracker.watch_system()
    return tracker
