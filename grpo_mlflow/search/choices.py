"""The samplers and pruners by name, with settings that suit noisy pass@k curves of few steps."""

from __future__ import annotations

import itertools
from typing import Any

import optuna
from optuna.pruners import (
    BasePruner,
    HyperbandPruner,
    MedianPruner,
    NopPruner,
    PatientPruner,
    PercentilePruner,
    SuccessiveHalvingPruner,
    ThresholdPruner,
)
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.study import StudyDirection

from grpo_mlflow import seeding
from grpo_mlflow.config import Config
from grpo_mlflow.errors import UserError, one_line
from grpo_mlflow.search.paired import PairedPruner
from grpo_mlflow.search.space import Space


def directions(config: Config) -> list[StudyDirection]:
    """Return what a study optimizes: pass@k, and for two objectives the cost."""
    return [StudyDirection.MAXIMIZE] + [StudyDirection.MINIMIZE] * (config.search.sampler == "nsga2")


def require(config: Config, space: Space) -> None:
    """Let the sampler propose as in a study, past its random start: only then does Optuna import what it needs.

    Raises:
        UserError: a package is missing.
    """
    study = optuna.create_study(directions=directions(config))
    try:
        for slot in range(_startup(config) + 1):
            trial = study.ask()
            study.sampler = sampler(config, slot)
            space.suggest(trial)
            study.tell(trial, [float(slot)] * len(study.directions))
    except ImportError as error:
        name = f"search.sampler = {config.search.sampler!r}"
        raise UserError(f"{name}: {one_line(error)}; needed: pip install {error.name}") from error


def _startup(config: Config) -> int:
    """Return how many trials are drawn at random before the sampler learns from them."""
    return min(10, max(3, config.search.n_trials // 3))


def sampler(config: Config, slot: int, drawn: int = 0) -> BaseSampler:
    """Return the sampler that proposes for one place in the queue.

    Its draws depend on the place alone (and on how often settings were `drawn` there before), and on no process: a
    study that is interrupted proposes what an undisturbed one does, and workers propose different settings. What it
    proposes follows from these draws and the trials that ended.
    """
    seed = seeding.integer(config.seed, "sampler", slot, drawn) % 2**32
    startup = _startup(config)
    if config.search.sampler in ("random", "grid"):  # a grid's settings are fixed in the queue
        return RandomSampler(seed=seed)
    if config.search.sampler == "gp":
        return GPSampler(seed=seed, n_startup_trials=startup)
    if config.search.sampler == "cmaes":
        return CmaEsSampler(seed=seed, n_startup_trials=startup)
    if config.search.sampler == "nsga2":
        return NSGAIISampler(seed=seed, population_size=max(4, config.search.n_trials // 4))
    return TPESampler(seed=seed, n_startup_trials=startup)


def pruner(config: Config) -> BasePruner:
    """Return the pruner. Where the library's default judges by one noisy value, it first waits for several."""
    name, looks = config.search.pruner, -(-config.train.iterations // config.eval.interval)
    least = config.eval.interval * max(1, looks // 4)  # resources are counted in iterations, as reports are
    patient = {"n_startup_trials": 5, "n_warmup_steps": config.train.iterations // 3, "n_min_trials": 5}
    made: dict[str, BasePruner] = {
        "paired": PairedPruner(
            looks, objective=config.search.objective, objective_window=config.search.objective_window
        ),
        "median": MedianPruner(**patient),
        "percentile": PercentilePruner(25.0, **patient),
        "asha": SuccessiveHalvingPruner(min_resource=least, reduction_factor=2),
        "hyperband": HyperbandPruner(least, max(least + 1, config.train.iterations), reduction_factor=3),
        "patient": PatientPruner(MedianPruner(**patient), patience=3, min_delta=0.02),
        "threshold": ThresholdPruner(lower=0.02, n_warmup_steps=config.train.iterations // 3),
        "none": NopPruner(),
    }
    return made[name]


def queue(config: Config, space: Space) -> list[dict[str, Any]]:
    """Return the fixed settings of each trial of the study.

    All combinations of a grid. Else the config's own settings come first, where the space holds them, because people
    want to know whether the search beats what they had; the sampler proposes the others.
    """
    if config.search.sampler == "grid":
        grid = space.grid()
        return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    own = space.own(config) or {}
    return [own if slot == 0 and config.search.n_trials > 1 else {} for slot in range(config.search.n_trials)]
