"""A study: what it tries, how it judges, how it confirms."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from grpo_mlflow.config.fields import NonNegative, Positive, PositiveFloat, Section, setting


class SearchConfig(Section, resume=False, compared=False, varies=False, secret=False, evaluation=False):
    space: Annotated[str, Field(min_length=1)] = setting("tiny", "what varies: a name, a file, KEY=[VALUES]")
    n_trials: Positive = setting(12, "trials of the whole study, over all commands that join it")
    timeout: PositiveFloat | None = setting(None, "seconds after which no further trial starts")
    sampler: Literal["tpe", "random", "grid", "gp", "cmaes", "nsga2"] = setting(
        "tpe", "who proposes settings; nsga2 has two objectives, pass@k and `cost`"
    )
    pruner: Literal["paired", "median", "asha", "hyperband", "percentile", "patient", "threshold", "none"] = setting(
        "paired", "who ends hopeless trials early"
    )
    n_jobs: Positive = setting(1, "trials at once on this machine, each in a process of its own")
    study_name: Annotated[str, Field(min_length=1)] = setting("grpo", "running it again continues the study")
    storage: str | None = setting(
        None, "Optuna storage URL; null: optuna.db beside the sqlite MLflow store", secret=True
    )
    k: Positive = setting(1, "the k of the pass@k to maximise", compared=True)
    objective: Literal["last", "mean", "best"] = setting(
        "last", "a trial's score: its last evaluation, the mean of its last ones, or its best", compared=True
    )
    objective_window: Positive = setting(3, "how many of the last evaluations `mean` takes", compared=True)
    cost: Literal["tokens", "seconds"] = setting(
        "tokens", "what nsga2 minimises beside: tokens or seconds", compared=True
    )
    finalists: NonNegative = setting(3, "best trials to measure again on fresh problems")
    confirm_seed_start: NonNegative = setting(50000, "first seed of the fresh problems")
    confirm_num_ids: Annotated[int, Field(ge=2)] = setting(
        512, "fresh problems that rank finalists, and as many after them for the winner"
    )
    confirm_replicates: Positive = setting(16, "completions per fresh problem")
    retrain_seeds: NonNegative = setting(
        0, "train each finalist again with this many new seeds, and confirm those models"
    )

    @property
    def confirm_seed_end(self) -> int:
        """The first seed after the fresh problems: a second block, which ranks nothing, follows that which ranks."""
        return self.confirm_seed_start + 2 * self.confirm_num_ids
