"""How a run ends that does not reach its end: its status in MLflow, and what is said of it."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from grpo_mlflow import tracking
from grpo_mlflow.config import Config
from grpo_mlflow.errors import PromptTooLong, Pruned, UserError, one_line
from grpo_mlflow.runs import messages, notes
from grpo_mlflow.runtime import failures, interrupts
from grpo_mlflow.runtime.console import Console
from grpo_mlflow.runtime.processes import Processes
from grpo_mlflow.tracking import Tracker

log = logging.getLogger(__name__)


@dataclass
class Ending:
    """Marks a run by what it raised. Without a tracker, before the run is open, there is nothing to mark."""

    config: Config
    kind: str
    processes: Processes
    console: Console
    tracker: Tracker | None = None

    def not_begun(self) -> None:
        """Mark the run KILLED that a signal stopped while it was opened."""
        if self.tracker is not None:
            self.tracker.finish("KILLED")

    def raised(self, tracker: Tracker, error: BaseException) -> None:
        """Mark the run by its error, and say how to go on.

        Raises:
            UserError: instead of an error of the machine, such as a full disk.
        """
        if isinstance(error, Pruned):
            tracker.tags({"optuna.state": "PRUNED"})
            self._note(tracker, f"pruned: {error}")
            tracker.finish("KILLED")
        elif isinstance(error, (interrupts.Interrupted, KeyboardInterrupt)):
            message = messages.how_to_resume(self.config, self.kind, tracker, "stopped")
            self._note(tracker, message)
            tracker.finish("KILLED")
            self.console.say(message)
        else:
            known = failures.told(error)
            if known is None:
                self._keep(tracker, error)
            self.failed(error)
            if known is not None and known is not error:
                raise known from error

    def _note(self, tracker: Tracker, message: str, reason: str = "") -> None:
        """Describe how the run has ended; what keeps that from being written must not keep the run from its end."""
        try:
            tracker.note(notes.ended(message, reason))
        except (OSError, UserError) as other:  # a full disk, or the run is another's by now
            log.debug("no description: %s", one_line(other))

    def _keep(self, tracker: Tracker, error: BaseException) -> None:
        """Keep the traceback of a mistake of our own in the run."""
        try:
            tracker.text(failures.LOG, failures.log(error))
        except (OSError, UserError) as other:  # what failed first is told
            self.console.warn(f"its traceback could not be kept: {one_line(other)}")
            return
        if self.processes.is_first:
            failures.note(error, tracker.run_dir / failures.LOG)

    def failed(self, error: BaseException | None = None) -> None:
        """Mark the run FAILED and say how to go on; where the process that tracks it is gone, the second does."""
        tracker, console = self.tracker, self.console
        if tracker is None:
            return
        if self.processes.first_lost and self.processes.rank == 1:
            console = Console()
            tracking.set_failed(self.config.tracking.uri, tracker.run_id)
        if isinstance(error, PromptTooLong):
            message = messages.how_to_go_around(self.config, self.kind, tracker, error)
        else:
            message = messages.how_to_resume(self.config, self.kind, tracker, "failed")
        self._note(tracker, message, one_line(error) if error else "")
        try:
            tracker.finish("FAILED")
        except OSError as full:  # a full disk, of which the run may have failed: what failed first is told
            console.warn(f"run {tracker.run_id} could not be marked FAILED: {one_line(full)}")
        console.say(message)
