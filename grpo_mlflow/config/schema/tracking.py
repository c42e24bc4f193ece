"""What a run keeps: checkpoints, and what it logs to MLflow."""

from __future__ import annotations

import warnings
from typing import Annotated

from pydantic import Field

from grpo_mlflow.config.fields import NonNegative, Positive, Section, setting


class CheckpointConfig(Section, resume=True, compared=False, varies=False, secret=False, evaluation=False):
    save_interval: NonNegative = setting(1, "iterations between checkpoints; 0: only the last")
    keep_last: Positive = setting(3, "newest checkpoints kept; the best by pass@1 is kept beside them")


with warnings.catch_warnings():
    # Every class of pydantic has a `register`, that of abstract classes, which nobody calls on a section.
    warnings.filterwarnings("ignore", 'Field name "register"')

    class TrackingConfig(Section, resume=True, compared=False, varies=False, secret=False, evaluation=False):
        uri: str | None = setting(None, "MLflow store; null: MLFLOW_TRACKING_URI, else ./mlflow.db", secret=True)
        experiment: Annotated[str, Field(min_length=1)] = setting("grpo", "MLflow experiment")
        run_name: str | None = setting(None, "MLflow run name; null: MLflow picks one")
        register: Annotated[str, Field(pattern=r"^[\w+-][\w .+-]*$")] | None = setting(
            None,
            "training: registered model whose next version, alias champion, the best checkpoint is to be; null: none",
        )
        rollouts: bool = setting(True, "keep every training rollout as rollouts/iter_NNN.jsonl")
        samples: NonNegative = setting(32, "completions in the table of each evaluation")
        system_metrics: bool = setting(False, "let MLflow log CPU, memory and GPU use")
