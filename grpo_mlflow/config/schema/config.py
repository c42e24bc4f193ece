"""All sections joined, and what follows from them together."""

from __future__ import annotations

from grpo_mlflow.config.fields import NonNegative, Section, setting
from grpo_mlflow.config.schema.data import DataConfig
from grpo_mlflow.config.schema.eval import EvalConfig
from grpo_mlflow.config.schema.generation import GenerationConfig
from grpo_mlflow.config.schema.model import ModelConfig
from grpo_mlflow.config.schema.search import SearchConfig
from grpo_mlflow.config.schema.tracking import CheckpointConfig, TrackingConfig
from grpo_mlflow.config.schema.train import TrainConfig


class Config(Section):
    """The resolved configuration of one run."""

    seed: NonNegative = setting(
        0,
        "seed of every random draw of the run: problems, sampling, order of the batches",
        resume=False,
        compared=True,
        varies=True,
        secret=False,
        evaluation=True,
    )
    resume: str | None = setting(
        None,
        "run id or checkpoint folder to continue, on the command line only; null: a new run",
        resume=True,
        compared=False,
        varies=False,
        secret=False,
        evaluation=False,
    )
    model: ModelConfig = ModelConfig()
    generation: GenerationConfig = GenerationConfig()
    train: TrainConfig = TrainConfig()
    data: DataConfig = DataConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    search: SearchConfig = SearchConfig()

    @property
    def rollouts_per_iteration(self) -> int:
        return self.data.problems_per_iteration * self.data.rollouts_per_problem

    @property
    def rollouts_per_step(self) -> int:
        accumulate = self.train.grad_accum_steps
        return self.rollouts_per_iteration if accumulate == "auto" else self.train.batch_size * accumulate

    @property
    def steps_per_iteration(self) -> int:
        return self.train.epochs * (self.rollouts_per_iteration // self.rollouts_per_step)
