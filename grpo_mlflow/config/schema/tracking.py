"""What a run keeps: checkpoints, and what it logs to MLflow."""

from __future__ import annotations

import warnings
from typing import Annotated

from pydantic import Field

from grpo_mlflow.config.fields import NonNegative, Positive, Section, setting


class CheckpointConfig(Section, resume=True, compared=False, varies=False, secret=False, evaluation=False):
    """Which checkpoints are kept."""

    save_interval: NonNegative = setting(1, "iterations between checkpoints; 0: only the last iteration is saved")
    keep_last: Positive = setting(3, "number of newest checkpoints that are kept; the best by pass@1 is kept as well")


with warnings.catch_warnings():
    # Every class of pydantic has a `register`, that of abstract classes, which nobody calls on a section.
    warnings.filterwarnings("ignore", 'Field name "register"')

    class TrackingConfig(Section, resume=True, compared=False, varies=False, secret=False, evaluation=False):
        """What is logged to MLflow, and where."""

        uri: str | None = setting(
            None, "address of the MLflow store; null: MLFLOW_TRACKING_URI, else ./mlflow.db", secret=True
        )
        experiment: Annotated[str, Field(min_length=1)] = setting(
            "grpo", "name of the MLflow experiment, made if missing; MLFLOW_EXPERIMENT_NAME wins over the default"
        )
        run_name: str | None = setting(
            None, "name of the MLflow run; null: MLFLOW_RUN_NAME, else one made of what the run is"
        )
        register: Annotated[str, Field(pattern=r"^[\w+-][\w .+-]*$")] | None = setting(
            None,
            "training: registered model whose next version, alias champion, the best checkpoint is to be; null: none",
        )
        rollouts: bool = setting(True, "keep every training rollout as rollouts/iter_NNN.jsonl")
        samples: NonNegative = setting(32, "completions in the table of each evaluation; 0: no table")
        system_metrics: bool = setting(False, "let MLflow log the use of CPU, memory and GPU")
