"""What a training run is made of."""

from __future__ import annotations

from dataclasses import dataclass

from grpo_mlflow.config import Config
from grpo_mlflow.generation import Generator
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.runtime.console import Console
from grpo_mlflow.runtime.processes import Processes
from grpo_mlflow.tasks import Task
from grpo_mlflow.tracking import Tracker
from grpo_mlflow.training.checkpoint import CheckpointStore
from grpo_mlflow.training.learner import Learner
from grpo_mlflow.training.sources import GroupSource


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a training run; every one can be replaced by a scripted one.

    `learner` changes `policy` in place. `evaluator` samples for evaluations; None with `eval.enabled=false`.
    """

    config: Config
    task: Task
    policy: Policy
    source: GroupSource
    evaluator: Generator | None
    learner: Learner
    processes: Processes
    tracker: Tracker
    store: CheckpointStore
    console: Console
