"""Writing to MLflow.

Files of a run are written into its run folder. Where the artifact store is a local folder that is the run folder, and
writing is logging; else files are uploaded. Every write to MLflow is an operation that can be repeated: if the store is
away, operations go to `spool.jsonl` in the run folder in order, training goes on, and they are replayed as soon as the
store answers, at the latest when the run is resumed.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Run
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS
from pydantic_core import to_jsonable_python

from grpo_mlflow import redaction
from grpo_mlflow.errors import redact
from grpo_mlflow.runtime import interrupts
from grpo_mlflow.tracking.operations import (
    Destination,
    Metrics,
    Operation,
    Params,
    Publish,
    Register,
    Remove,
    Status,
    Tags,
)
from grpo_mlflow.tracking.outbox import Outbox
from grpo_mlflow.tracking.store import listed_tables, local_path, upload_folder

_FLUSH_SECONDS = 5.0  # a call to a store costs as much for one step as for many
_TABLES = 80  # that the UI lists: a tag takes 8000 characters
log = logging.getLogger(__name__)


class MlflowTracker:
    """Writes to one MLflow run. No method raises because the store is away."""

    def __init__(self, client: mlflow.MlflowClient, run: Run) -> None:
        self._client, self.run_id = client, run.info.run_id
        self.url = mlflow.get_tracking_uri()
        local = local_path(run.info.artifact_uri)
        self._uploads = local is None
        self.run_dir = local or upload_folder(self.run_id)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        artifacts = get_artifact_repository(run.info.artifact_uri)
        self._outbox = Outbox(Destination(client, self.run_id, self.run_dir, artifacts))
        self._flush_at = 0.0
        self._points: list[tuple[dict[str, float], int, int]] = []
        self._logged: dict[int, set[tuple[str, float]]] = {}
        tags = dict(run.data.tags)
        for operation in self._outbox.waiting():
            tags |= operation.values if isinstance(operation, Tags) else {}
        self._tables = listed_tables(tags)
        self._monitor: SystemMetricsMonitor | None = None

    def params(self, values: Mapping[str, Any]) -> None:
        """Log parameters that the run lacks; `mlflow run` has logged some of them in its own spelling."""
        self._do(Params({key: redact(str(redaction.without(value))) for key, value in values.items()}))

    def tags(self, values: Mapping[str, str]) -> None:
        self._do(Tags({key: redact(value) for key, value in values.items()}))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log all values at one step, unless a run before its resume logged the same.

        They are sent together with those of other steps, within seconds and before anything else is written.
        """
        if any(item in self._logged.get(step, ()) for item in values.items()):
            return
        allowed = {re.sub(r"[^\w\-. :/]", "_", name): value for name, value in values.items()}
        self._points.append((allowed, step, int(time.time() * 1000)))
        if time.monotonic() >= self._flush_at or self._outbox.waits():  # while the store is away, the disk is safer
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
        path.write_text(json.dumps(redaction.without(data)))
        self.publish(name)
        entry = {"path": name, "type": "table"}
        self._tables = [*(table for table in self._tables if table != entry), entry][-_TABLES:]
        self.tags({MLFLOW_LOGGED_ARTIFACTS: json.dumps(self._tables)})

    def publish(self, name: str) -> None:
        """Upload a file or folder of the run folder, where the store is not that folder itself."""
        if self._uploads:
            self._do(Publish(name))

    def remove(self, name: str) -> None:
        """Delete an artifact that was published."""
        if self._uploads:
            self._do(Remove(name))

    def register(self, name: str, alias: str, run_id: str, artifact: str, tags: Mapping[str, str]) -> None:
        """Make an artifact of a run the newest version of a registered model, and let the alias name it."""
        self._do(Register(name, alias, run_id, artifact, redaction.without(dict(tags))))

    def watch_system(self) -> None:
        """Log CPU, memory and GPU use in the background until the run ends."""
        self._monitor = SystemMetricsMonitor(self.run_id, resume_logging=True)
        self._monitor.start()

    def finish(self, status: str) -> None:
        """Set the final status: FINISHED, FAILED or KILLED."""
        if self._monitor is not None:
            self._monitor.finish()
        self._outbox.hurry()
        self.tags({"grpo.ended": status})  # `mlflow run` overwrites the status itself with FINISHED or FAILED
        self._do(Status(status))
        if self._outbox.waits():
            log.warning("MLflow is away: resume=%s sends what is kept in %s", self.run_id, self._outbox.path)

    def _path(self, name: str) -> Path:
        path = self.run_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _do(self, operation: Operation) -> None:
        self.flush()
        self._outbox.send(operation)

    @interrupts.deferred()
    def flush(self) -> None:
        """Send the metrics that wait."""
        if self._points:
            points, self._points = self._points, []
            self._outbox.send(Metrics(points))
        self._flush_at = time.monotonic() + _FLUSH_SECONDS
