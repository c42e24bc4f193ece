"""What a write to MLflow is: a record that can be sent, sent again, and kept on the disk until it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import mlflow
from mlflow.store.artifact.artifact_repo import ArtifactRepository


@dataclass(frozen=True, slots=True)
class Destination:
    """The MLflow run that operations are sent to, and the folder of its files."""

    client: mlflow.MlflowClient
    run_id: str
    run_dir: Path
    artifacts: ArtifactRepository


@dataclass(frozen=True, slots=True)
class Operation(ABC):
    """One write, which may be repeated: that changes nothing.

    On the disk it is a JSON list: its word, then its fields in order. Runs of earlier versions have left such lists.
    """

    word: ClassVar[str]
    # The client of an object store has errors of its own: none of them says that it will never take a file.
    refusable: ClassVar[bool] = True

    @property
    def ends(self) -> bool:
        """Whether it says how the run has ended."""
        return False

    @abstractmethod
    def send(self, to: Destination) -> None:
        """Write to the run.

        Raises:
            Exception: the store is away or refuses it, as MLflow's client says.
        """

    def as_list(self) -> list[Any]:
        """Return what `from_list` reads."""
        return [self.word, *(getattr(self, field.name) for field in fields(self))]
