"""What the rest of the program needs of tracking, and the tracker that does nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from grpo_mlflow.tasks.data_sets import DataSet
from grpo_mlflow.tracking.models import Kept


class Tracker(Protocol):
    """Writes to one run. No method raises because the store is away."""

    @property
    def run_id(self) -> str: ...

    @property
    def run_dir(self) -> Path:
        """The folder of the run's files."""
        ...

    @property
    def url(self) -> str | None:
        """The address of the store; None where this process writes to none."""
        ...

    def params(self, values: Mapping[str, Any]) -> None:
        """Log parameters that the run lacks."""
        ...

    def tags(self, values: Mapping[str, str]) -> None: ...

    def data(self, used: DataSet) -> None:
        """Log a data set that the run uses."""
        ...

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log all values at one step."""
        ...

    def flush(self) -> None:
        """Send the metrics that wait."""
        ...

    def settle(self) -> None:
        """Wait until the store has all that was written, but not while it is away."""
        ...

    def text(self, name: str, content: str) -> None:
        """Write a file of the run and publish it."""
        ...

    def table(self, name: str, columns: Mapping[str, list[Any]]) -> None:
        """Write columns as a table of the run."""
        ...

    def publish(self, name: str) -> None:
        """Make a file or folder of the run folder an artifact of the run."""
        ...

    def remove(self, name: str) -> None:
        """Delete an artifact that was published."""
        ...

    def register(self, name: str, alias: str, run_id: str, artifact: str, tags: Mapping[str, str]) -> None:
        """Make an artifact of a run the newest version of a registered model, and let the alias name it."""
        ...

    def models(self, run_id: str, kept: Sequence[Kept]) -> None:
        """Make checkpoints of a run models of MLflow: all that the run keeps, since others may go."""
        ...

    def measured(self, run_id: str, checkpoint: str, metrics: Mapping[str, float]) -> None:
        """Let metrics of this run stand with the model of another run's checkpoint, if it is one."""
        ...

    def finish(self, status: str) -> None:
        """Set the final status: FINISHED, FAILED or KILLED."""
        ...


class NullTracker:
    """Tracks nothing: for all processes but the first, which share its run."""

    url = None

    def __init__(self, run_id: str, run_dir: Path) -> None:
        self.run_id, self.run_dir = run_id, run_dir

    def params(self, values: Mapping[str, Any]) -> None:
        pass

    def tags(self, values: Mapping[str, str]) -> None:
        pass

    def data(self, used: DataSet) -> None:
        pass

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        pass

    def flush(self) -> None:
        pass

    def settle(self) -> None:
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

    def models(self, run_id: str, kept: Sequence[Kept]) -> None:
        pass

    def measured(self, run_id: str, checkpoint: str, metrics: Mapping[str, float]) -> None:
        pass

    def finish(self, status: str) -> None:
        pass
