"""Writes of what people look at in MLflow: descriptions, answers to commands, data sets, views."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from grpo_mlflow.tracking import models, views
from grpo_mlflow.tracking.operation import Destination, Operation
from grpo_mlflow.tracking.places import ANSWER, COMMAND

_NOTED = "grpo.note"  # of which text the description is that was written last
_PROMPTS = json.dumps({"mlflow_colspec": [{"name": "prompt", "type": "string", "required": True}]})


@dataclass(frozen=True, slots=True)
class Note(Operation):
    """The description of the run; it replaces one of ours, which a tag tells from what people have written."""

    word = "note"
    text: str

    def send(self, to: Destination) -> None:
        tags = to.client.get_run(to.run_id).data.tags
        known = tags.get(models.NOTE, "")
        if known and _digest(known) != tags.get(_NOTED):
            return
        both = {_NOTED: _digest(self.text), models.NOTE: self.text}
        to.client.log_batch(to.run_id, tags=[RunTag(key, value) for key, value in both.items()])


@dataclass(frozen=True, slots=True)
class Answer(Operation):
    """What became of a command; it is taken away, unless another one stands in its place by now."""

    word = "answer"
    command: str
    answer: str

    def send(self, to: Destination) -> None:
        to.client.set_tag(to.run_id, ANSWER, self.answer)
        if to.client.get_run(to.run_id).data.tags.get(COMMAND, "").strip() == self.command:
            to.client.set_tag(to.run_id, COMMAND, "")


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
        _use(to, Dataset(self.name, self.digest, kind, source, profile=profile), self.context)


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
        source, profile = json.dumps(self.source), json.dumps(self.profile)
        _use(to, Dataset(self.name, self.digest, self.source_type, source, _PROMPTS, profile), self.context)


@dataclass(frozen=True, slots=True)
class SharedView(Operation):
    """A saved view of the run's experiment: the name of its tag, its own name, and its state as JSON."""

    word = "view"
    tag: str
    name: str
    state: str

    def send(self, to: Destination) -> None:
        experiment = to.client.get_experiment(to.client.get_run(to.run_id).info.experiment_id)
        value = views.packed(self.name, self.state, experiment.tags.get(self.tag))
        if value is not None:
            to.client.set_experiment_tag(experiment.experiment_id, self.tag, value)


def _use(to: Destination, found: Dataset, context: str) -> None:
    to.client.log_inputs(to.run_id, [DatasetInput(found, [InputTag(MLFLOW_DATASET_CONTEXT, context)])])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
