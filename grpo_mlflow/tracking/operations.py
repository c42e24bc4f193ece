"""Every write to MLflow as a record that can be sent, sent again, and kept on the disk until it is."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import mlflow
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from grpo_mlflow.tracking import models
from grpo_mlflow.tracking.places import ENDED
from grpo_mlflow.tracking.registry import register
from grpo_mlflow.tracking.store import transfer

_PROMPTS = json.dumps({"mlflow_colspec": [{"name": "prompt", "type": "string", "required": True}]})


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


@dataclass(frozen=True, slots=True)
class Params(Operation):
    """Parameters; those that the run has keep their values, since MLflow takes no other ones."""

    word = "params"
    values: Mapping[str, str]

    def send(self, to: Destination) -> None:
        known = to.client.get_run(to.run_id).data.params
        absent = [Param(key, value) for key, value in self.values.items() if key not in known]
        for start in range(0, len(absent), 100):
            to.client.log_batch(to.run_id, params=absent[start : start + 100])


@dataclass(frozen=True, slots=True)
class Tags(Operation):
    """Tags; they replace those of the same names."""

    word = "tags"
    values: Mapping[str, str]

    @property
    def ends(self) -> bool:
        return ENDED in self.values

    def send(self, to: Destination) -> None:
        to.client.log_batch(to.run_id, tags=[RunTag(key, value) for key, value in self.values.items()])


@dataclass(frozen=True, slots=True)
class Data(Operation):
    """A data set as version 0.1 wrote it; one of the same name and digest is the same."""

    word = "data"
    name: str
    digest: str
    source: str
    context: str
    rows: int

    def send(self, to: Destination) -> None:
        kind, key = ("http", "url") if self.source.startswith("https://") else ("local", "uri")  # as MLflow has them
        source, profile = json.dumps({key: self.source}), json.dumps({"num_rows": self.rows})
        found = Dataset(self.name, self.digest, kind, source, profile=profile)
        to.client.log_inputs(to.run_id, [DatasetInput(found, [InputTag(MLFLOW_DATASET_CONTEXT, self.context)])])


@dataclass(frozen=True, slots=True)
class DataSet(Operation):
    """A data set that the run uses, with all that MLflow shows of it."""

    word = "dataset"
    name: str
    digest: str
    context: str
    source_type: str
    source: Mapping[str, Any]
    profile: Mapping[str, Any]

    def send(self, to: Destination) -> None:
        found = Dataset(
            self.name, self.digest, self.source_type, json.dumps(self.source), _PROMPTS, json.dumps(self.profile)
        )
        to.client.log_inputs(to.run_id, [DatasetInput(found, [InputTag(MLFLOW_DATASET_CONTEXT, self.context)])])


@dataclass(frozen=True, slots=True)
class Metrics(Operation):
    """Metrics of several steps: of each its values, the step, and when they were logged in ms since 1970."""

    word = "metrics"
    points: Sequence[tuple[Mapping[str, float], int, int]]

    def send(self, to: Destination) -> None:
        points = [Metric(key, value, at, step) for named, step, at in self.points for key, value in named.items()]
        for start in range(0, len(points), 1000):
            to.client.log_batch(to.run_id, metrics=points[start : start + 1000])


@dataclass(frozen=True, slots=True)
class Publish(Operation):
    """A file or folder of the run folder, uploaded under the same name."""

    word, refusable = "publish", False
    name: str

    def send(self, to: Destination) -> None:
        path = to.run_dir / self.name
        to.client.get_run(to.run_id)  # a store that is away says so sooner here
        with transfer(), suppress(FileNotFoundError):  # a checkpoint may be deleted before, or while it is sent
            if path.is_dir():
                to.artifacts.log_artifacts(str(path), self.name)
            elif path.exists():
                parent = str(Path(self.name).parent)
                to.artifacts.log_artifact(str(path), None if parent == "." else parent)


@dataclass(frozen=True, slots=True)
class Remove(Operation):
    """An artifact to delete."""

    word, refusable = "remove", False
    name: str

    def send(self, to: Destination) -> None:
        to.artifacts.delete_artifacts(self.name)


@dataclass(frozen=True, slots=True)
class Register(Operation):
    """An artifact of a run as the newest version of a registered model, which the alias then names."""

    word = "register"
    name: str
    alias: str
    run_id: str
    artifact: str
    tags: Mapping[str, str]

    def send(self, to: Destination) -> None:
        register(to.client, self.name, self.alias, self.run_id, self.artifact, self.tags)


@dataclass(frozen=True, slots=True)
class Models(Operation):
    """Checkpoints of a run, this one or another, that are to be models: fields of `models.Kept`, by name."""

    word = "models"
    run_id: str
    kept: Sequence[Mapping[str, Any]]

    def send(self, to: Destination) -> None:
        models.keep(to.client, self.run_id, [models.Kept(**each) for each in self.kept])


@dataclass(frozen=True, slots=True)
class Measured(Operation):
    """What the run has measured of a checkpoint of another run."""

    word = "measured"
    run_id: str
    checkpoint: str
    metrics: Mapping[str, float]

    def send(self, to: Destination) -> None:
        models.measured(to.client, to.run_id, self.run_id, self.checkpoint, self.metrics)


@dataclass(frozen=True, slots=True)
class Status(Operation):
    """The status that the run ends with: FINISHED, FAILED or KILLED."""

    word = "status"
    status: str

    @property
    def ends(self) -> bool:
        return True

    def send(self, to: Destination) -> None:
        to.client.set_terminated(to.run_id, self.status)


@dataclass(frozen=True, slots=True)
class Unknown(Operation):
    """A line that this version cannot send, such as one that a newer version left."""

    word = ""
    line: Sequence[Any]

    def send(self, to: Destination) -> None:
        raise ValueError(f"no operation {self.line[0]!r}")

    def as_list(self) -> list[Any]:
        return list(self.line)


_KINDS: Mapping[str, type[Operation]] = {
    kind.word: kind
    for kind in (Params, Tags, Data, DataSet, Metrics, Publish, Remove, Register, Models, Measured, Status)
}


def from_list(line: Sequence[Any]) -> Operation:
    """Return the operation that `as_list` wrote."""
    word, *values = line
    kind = _KINDS.get(word)
    if kind is None or len(fields(kind)) != len(values):
        return Unknown(line)
    return kind(*values)
