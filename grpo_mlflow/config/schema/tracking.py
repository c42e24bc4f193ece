"""What a run keeps: checkpoints, and what it logs to MLflow."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from grpo_mlflow.config.fields import NonNegative, Positive, Section


class CheckpointConfig(Section):
    save_interval: NonNegative = Field(1, description="iterations between checkpoints; 0: only the last")
    keep_last: Positive = Field(3, description="newest checkpoints kept; the best by pass@1 is kept beside them")


class TrackingConfig(Section):
    uri: str | None = Field(None, description="MLflow store; null: MLFLOW_TRACKING_URI, else ./mlflow.db")
    experiment: Annotated[str, Field(min_length=1)] = Field("grpo", description="MLflow experiment")
    run_name: str | None = Field(None, description="MLflow run name; null: MLflow picks one")
    rollouts: bool = Field(True, description="keep every training rollout as rollouts/iter_NNN.jsonl")
    samples: NonNegative = Field(32, description="completions in the table of each evaluation")
    system_metrics: bool = Field(False, description="let MLflow log CPU, memory and GPU use")
