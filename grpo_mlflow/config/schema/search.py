"""A study: what it tries, how it judges, how it confirms."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from grpo_mlflow.config.fields import NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section, setting


class SearchConfig(Section, resume=False, compared=False, varies=False, secret=False, evaluation=False):
    """A study (`grpo optimize`): what it tries, how it judges, how it confirms."""

    space: Annotated[str, Field(min_length=1)] = setting(
        "tiny",
        "what the study varies: a shipped space (tiny, lora, full), a YAML file, or KEY=[VALUES] ... in "
        "one text (docs/optimize.md)",
    )
    n_trials: Positive = setting(12, "trials of the whole study, over all commands that join it")
    timeout: PositiveFloat | None = setting(None, "seconds after which no further trial starts; null: no limit")
    sampler: Literal["tpe", "random", "grid", "gp", "cmaes", "nsga2"] = setting(
        "tpe", "Optuna sampler that proposes the settings of a trial; nsga2 optimises two objectives, pass@k and cost"
    )
    pruner: Literal["paired", "median", "asha", "hyperband", "percentile", "patient", "threshold", "none"] = setting(
        "paired",
        "rule that ends trials early; paired: those that are behind the best on the same problems, beyond noise",
    )
    n_jobs: Positive = setting(1, "trials at the same time, each in a process of its own, this one among them")
    launcher: Literal["local", "ray"] = setting(
        "local", "where the other n_jobs processes run: on this machine, or on a Ray cluster (the one of RAY_ADDRESS)"
    )
    cpus_per_worker: Positive = setting(1, "CPU cores that a process on Ray takes")
    gpus_per_worker: NonNegativeFloat | None = setting(
        None, "GPUs, or the share of one, that a process on Ray takes; null: 1 where the cluster has GPUs, else 0"
    )
    study_name: Annotated[str, Field(min_length=1)] = setting(
        "grpo", "name of the study; a command with the same name continues it"
    )
    storage: str | None = setting(
        None,
        "Optuna storage: sqlite:///FILE, postgresql://..., or journal:FILE; null: optuna.db beside a "
        "sqlite MLflow store",
        secret=True,
    )
    k: Positive = setting(1, "the k of the pass@k to maximise", compared=True)
    objective: Literal["last", "mean", "best"] = setting(
        "last",
        "score of a trial: pass@k of its last evaluation, the mean over its last objective_window ones, or its best",
        compared=True,
    )
    objective_window: Positive = setting(3, "number of last evaluations that objective mean averages", compared=True)
    cost: Literal["tokens", "seconds"] = setting(
        "tokens", "second objective of nsga2, which it minimises: sampled tokens, or seconds", compared=True
    )
    finalists: NonNegative = setting(3, "number of best trials that are measured again on fresh problems; 0: none")
    confirm_seed_start: NonNegative = setting(50000, "number of the first fresh problem")
    confirm_num_ids: Annotated[int, Field(ge=2)] = setting(
        512, "number of fresh problems that rank the finalists; as many more then measure the winner"
    )
    confirm_replicates: Positive = setting(16, "completions per fresh problem")
    retrain_seeds: NonNegative = setting(
        0,
        "train each finalist again with this many new seeds, and confirm those models; 0: confirm the "
        "trial's own model",
    )

    @property
    def confirm_seed_end(self) -> int:
        """The first seed after the fresh problems: a second block, which ranks nothing, follows that which ranks."""
        return self.confirm_seed_start + 2 * self.confirm_num_ids
