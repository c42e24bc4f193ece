"""Writing to MLflow.

Files of a run are written into its run folder. Where the artifact store is a local folder that is the run folder, and
writing is logging; else files are uploaded. Every write to MLflow is an operation that can be repeated: it goes to
`spool.jsonl` in the run folder, and a thread sends it from there, in order. While the store is slow or away, training
goes on; what waits is sent when the store answers, when the run is resumed, or by `upload`.
"""

from __future__ import annotations

import json
import logging
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import mlflow
from mlflow.entities import Run
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS
from pydantic_core import to_jsonable_python

from grpo_mlflow import redaction
from grpo_mlflow.errors import redact
from grpo_mlflow.program import program
from grpo_mlflow.runtime import interrupts
from grpo_mlflow.runtime.files import write_whole
from grpo_mlflow.tasks import data_sets
from grpo_mlflow.tracking import ownership
from grpo_mlflow.tracking.borders import STORE_ERRORS
from grpo_mlflow.tracking.commands import Commands
from grpo_mlflow.tracking.models import Kept
from grpo_mlflow.tracking.operation import Operation
from grpo_mlflow.tracking.operations import Measured, Metrics, Models, Params, Publish, Register, Remove, Status, Tags
from grpo_mlflow.tracking.outbox import Outbox
from grpo_mlflow.tracking.places import COMMAND, ENDED, run_folder
from grpo_mlflow.tracking.sender import Sender
from grpo_mlflow.tracking.shown import Answer, DataSet, Note, SharedView
from grpo_mlflow.tracking.store import listed_tables, local_path
from grpo_mlflow.tracking.upload import destination
from grpo_mlflow.tracking.views import View

_FLUSH_SECONDS = 5.0  # a call to a store costs as much for one step as for many
_TABLES = 80  # that the UI lists: a tag takes 8000 characters
_TELLING = ("train/loss_total", "eval/pass_at_1")  # one of them known, all of its step is
log = logging.getLogger(__name__)


def _is_remembered(key: str) -> bool:
    return key in _TELLING or key.startswith("study/")


class MlflowTracker:
    """Writes to one MLflow run. No method raises because the store is away.

    After long silence on another machine the run may have been taken over: then what writes raises UserError.
    """

    def __init__(self, client: mlflow.MlflowClient, run: Run) -> None:
        self._client, self.run_id, self.experiment_id = client, run.info.run_id, run.info.experiment_id
        self.url = mlflow.get_tracking_uri()
        self._uploads = local_path(run.info.artifact_uri) is None
        self.run_dir = run_folder(run)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._outbox = Outbox(destination(client, run, self.run_dir))
        self._sender = Sender(self._outbox)
        self._flush_at = 0.0
        self._points: list[tuple[dict[str, float], int, int]] = []
        self._logged: dict[int, set[tuple[str, float]]] = {}
        tags = dict(run.data.tags)
        for operation in self._outbox.waiting():
            tags |= operation.values if isinstance(operation, Tags) else {}
        self._tables = listed_tables(tags)
        self._monitor: SystemMetricsMonitor | None = None
        self._holding: ownership.Holding | None = None
        self._commands: Commands | None = None
        self._answered = ""  # a command whose answer the store may not have yet

    def params(self, values: Mapping[str, Any]) -> None:
        """Log parameters that the run lacks; `mlflow run` has logged some of them in its own spelling."""
        self._do(Params({key: _sendable(str(redaction.without(value))) for key, value in values.items()}))

    def tags(self, values: Mapping[str, str]) -> None:
        self._do(Tags({key: _sendable(value) for key, value in values.items()}))

    def note(self, text: str) -> None:
        """Describe the run, in Markdown, unless somebody has written a description of their own."""
        self._do(Note(_sendable(text)))

    def data(self, used: data_sets.DataSet) -> None:
        """Log a data set that the run uses."""
        shown = [json.loads(_sendable(json.dumps(redaction.without(each)))) for each in (used.source, used.profile)]
        self._do(DataSet(_sendable(used.name), used.digest, used.context, used.source_type, *shown))

    def view(self, view: View) -> None:
        """Save a view of the experiment, in place of an earlier state of the same view."""
        tag, state = view.tag()
        self._do(SharedView(tag, view.name, _sendable(state)))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log all values at one step, unless a run before its resume logged the same.

        They are sent together with those of other steps, within seconds and before anything else is written.
        """
        logged = self._logged.get(step, ())
        if any(item in logged for item in values.items() if item[0] in _TELLING):
            return
        new = {name: value for name, value in values.items() if (name, value) not in logged}
        if not new:
            return
        self._points.append((_named(new), step, int(time.time() * 1000)))
        if time.monotonic() >= self._flush_at or self._outbox.is_away:  # then a kill loses the less, and nothing waits
            self._send_points()

    def remember(self) -> None:
        """Take note of the curves that the run has, so that a resume that repeats steps gives one continuous curve.

        Those that wait for the store count as well. Steps are recognised by their loss or pass@1, and each result of a
        study by itself; where repetition is not exact both points are kept. How the run had ended is forgotten.
        """
        with suppress(OSError):  # a full disk
            self._outbox.forget_end()
        for key in filter(_is_remembered, self._client.get_run(self.run_id).data.metrics):
            for point in self._client.get_metric_history(self.run_id, key):
                self._logged.setdefault(point.step, set()).add((key, point.value))
        for operation in self._outbox.waiting():  # nothing of it is sent before the first write
            for values, step, _ in operation.points if isinstance(operation, Metrics) else ():
                self._logged.setdefault(step, set()).update((k, v) for k, v in values.items() if _is_remembered(k))

    def text(self, name: str, content: str) -> None:
        """Write a file of the run and publish it."""
        write_whole(self.run_dir / name, _sendable(content), synced=name.startswith("config/"))  # which a resume needs
        self.publish(name)

    def table(self, name: str, columns: Mapping[str, list[Any]]) -> None:
        """Write columns as a table of the run, which the UI lists among its newest ones.

        It is what `log_table` would leave, but written again it is replaced, not lengthened, and the list never
        outgrows a tag, which MLflow cuts off and then cannot read.
        """
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        data = to_jsonable_python({"columns": list(columns), "data": rows}, inf_nan_mode="null", fallback=str)
        write_whole(self.run_dir / name, json.dumps(redaction.without(data)))
        self.publish(name)
        entry = {"path": name, "type": "table"}
        self._tables = [*(table for table in self._tables if table != entry), entry][-_TABLES:]
        self.tags({MLFLOW_LOGGED_ARTIFACTS: json.dumps(self._tables)})

    def publish(self, name: str) -> None:
        """Upload a file or folder of the run folder, where the store is not that folder itself."""
        if self._uploads:
            self._do(Publish(name))

    def publish_aside(self, name: str) -> None:
        """Publish a file as `publish` does, but from any thread, and in no order to the metrics that wait."""
        if self._uploads and not (self._holding is not None and self._holding.lost):
            self._sender.send(Publish(name))

    def remove(self, name: str) -> None:
        """Delete an artifact that was published."""
        if self._uploads:
            self._do(Remove(name))

    def register(self, name: str, alias: str, run_id: str, artifact: str, tags: Mapping[str, str]) -> None:
        """Make an artifact of a run the newest version of a registered model, and let the alias name it."""
        self._do(Register(name, alias, run_id, artifact, _hidden(tags)))

    def models(self, run_id: str, kept: Sequence[Kept]) -> None:
        """Make checkpoints of a run models of MLflow: all that the run keeps, since others may go."""
        hidden = [
            replace(each, metrics=_named(each.metrics), params=_hidden(each.params), tags=_hidden(each.tags))
            for each in kept
        ]
        self._do(Models(run_id, [asdict(each) for each in hidden]))

    def measured(self, run_id: str, checkpoint: str, metrics: Mapping[str, float]) -> None:
        """Let metrics of this run stand with the model of another run's checkpoint, if it is one."""
        self._do(Measured(run_id, checkpoint, _named(metrics)))

    def settle(self, seconds: float | None = None) -> None:
        """Wait until the store has all that was written, but not while it is away (`Sender.settle`)."""
        self._sender.settle(seconds)

    def hold(self, *, resumed: bool) -> None:
        """Show that this process works on the run, until it is finished; a command from before a resume is declined."""
        self._holding = ownership.Holding(self._client, self.run_id)
        if not resumed:
            return
        known = [each.command for each in self._outbox.waiting() if isinstance(each, Answer)]
        with suppress(*STORE_ERRORS):
            if not known and (left := self._client.get_run(self.run_id).data.tags.get(COMMAND, "").strip()):
                known = [left]
                self._do(Answer(left, f"{left}: not done: it was asked while nothing ran"))
        self._answered = known[-1] if known else ""

    def command(self) -> str:
        """Return what somebody asks of the run by its tag `grpo.command`; empty for nothing.

        The first call begins to look for it: a run that never asks, such as an evaluation, obeys nothing.
        """
        if self._commands is None and self._holding is not None:
            self._commands = Commands(self._client, self.run_id, self._answered)
        return self._commands.waiting if self._commands is not None else ""

    def answer(self, command: str, answer: str) -> None:
        """Say what became of a command, which is then asked no more."""
        if self._commands is not None:
            self._commands.answered(command)
        self._do(Answer(command, _sendable(answer)))

    def watch_system(self) -> None:
        """Log CPU, memory and GPU use in the background until the run ends."""
        self._monitor = SystemMetricsMonitor(self.run_id, resume_logging=True)
        self._monitor.start()

    def finish(self, status: str) -> None:
        """Set the final status: FINISHED, FAILED or KILLED."""
        try:
            if self._commands is not None:
                self._commands.end()
            if self._monitor is not None:
                self._monitor.finish()
            if self._holding is not None and self._holding.lost:
                return  # its status is another's
            self.tags({ENDED: status})  # `mlflow run` overwrites the status itself with FINISHED or FAILED
            self._do(Status(status))
            self.settle()
        finally:
            self._sender.end()
            if self._holding is not None:
                self._holding.end()  # also while something waits: who goes on with the run sends it
                self._holding = None
        if self._outbox.waits():
            log.warning(
                "MLflow lacks what is kept in %s; `%s upload --folder %s tracking.uri=%s` sends it",
                *(self._outbox.path, program(), shlex.quote(str(self.run_dir)), shlex.quote(redact(self.url))),
            )

    def flush(self) -> None:
        """Put all metrics where neither a kill nor a failure of the machine loses them."""
        self._send_points()
        self._outbox.sync()

    def _do(self, operation: Operation) -> None:
        self._send_points()
        self._sender.send(operation)

    def _require_held(self) -> None:
        if self._holding is not None and self._holding.lost:
            self._sender.end()
            self._holding.require()

    @interrupts.deferred()
    def _send_points(self) -> None:
        """Send the metrics that wait."""
        self._require_held()
        if self._points:
            self._sender.send(Metrics(self._points))
            self._points = []
        self._flush_at = time.monotonic() + _FLUSH_SECONDS


def _hidden(values: Mapping[str, str]) -> dict[str, str]:
    return {key: _sendable(value) for key, value in redaction.without(values).items()}


def _named(values: Mapping[str, float]) -> dict[str, float]:
    """Return metrics by names that MLflow takes."""
    return {re.sub(r"[^\w\-. :/]", "_", name): value for name, value in values.items()}


def _sendable(text: str) -> str:
    """Return a text without passwords, and with halves of surrogate pairs escaped: no store and no file holds those."""
    return redact(text).encode(errors="backslashreplace").decode()
