"""A study: what it tries, how it judges, how it confirms."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from grpo_mlflow.config.fields import NonNegative, Positive, PositiveFloat, Section


class SearchConfig(Section):
    space: Annotated[str, Field(min_length=1)] = Field("tiny", description="what varies: a name, a file, KEY=[VALUES]")
    n_trials: Positive = Field(12, description="trials of the whole study, over all commands that join it")
    timeout: PositiveFloat | None = Field(None, description="seconds after which no further trial starts")
    sampler: Literal["tpe", "random", "grid", "gp", "cmaes", "nsga2"] = Field(
        "tpe", description="who proposes settings; nsga2 has two objectives, pass@k and `cost`"
    )
    pruner: Literal["paired", "median", "asha", "hyperband", "percentile", "patient", "threshold", "none"] = Field(
        "paired", description="who ends hopeless trials early"
    )
    n_jobs: Positive = Field(1, description="trials at once on this machine, each in a process of its own")
    study_name: Annotated[str, Field(min_length=1)] = Field("grpo", description="running it again continues the study")
    storage: str | None = Field(None, description="Optuna storage URL; null: optuna.db beside the sqlite MLflow store")
    k: Positive = Field(1, description="the k of the pass@k to maximise")
    objective: Literal["last", "mean", "best"] = Field(
        "last", description="a trial's score: its last evaluation, the mean of its last ones, or its best"
    )
    objective_window: Positive = Field(3, description="how many of the last evaluations `mean` takes")
    cost: Literal["tokens", "seconds"] = Field("tokens", description="what nsga2 minimises beside: tokens or seconds")
    finalists: NonNegative = Field(3, description="best trials to measure again on fresh problems")
    confirm_seed_start: NonNegative = Field(50000, description="first of the fresh problems")
    confirm_num_ids: Annotated[int, Field(ge=2)] = Field(512, description="number of fresh problems")
    confirm_replicates: Positive = Field(16, description="completions per fresh problem")
    retrain_seeds: NonNegative = Field(
        0, description="train each finalist again with this many new seeds, and confirm those models"
    )
