"""How long a decaying learning rate keeps a trial from being judged.

Steps that are too large cost skill until they shrink, so a part of the progress comes when the learning rate falls
(Smith et al. 2018, arXiv 1711.00489). No learning curve tells by how much: a trial is judged once little is left to
fall. A constant learning rate has no such wait.
"""

from __future__ import annotations

from collections.abc import Sequence

from optuna.distributions import CategoricalDistribution

from grpo_mlflow.algorithm.schedules import learning_rate
from grpo_mlflow.config import Config, Resolved, overlay
from grpo_mlflow.search.space import Space

KEY = "learning_rates"  # in a trial's records: its learning rate at each evaluation, over its peak
LEAST_LOOKS = 3  # evaluations: the last two are tested, and what comes before them shows where the curve came from
_LEFT = 0.25  # share of its peak that the learning rate may still lose: a cosine's from two thirds of the run on
_SCHEDULE, _PRUNER = "train.lr_schedule", "search.pruner = paired"


def learning_rates(config: Config) -> list[float]:
    """Return the learning rate of the last optimizer step before each evaluation, over its peak; (evaluations,)."""
    train, each, interval = config.train, config.steps_per_iteration, config.eval.interval
    ends = [*range(interval, train.iterations, interval), train.iterations]
    total = train.iterations * each
    return [learning_rate(end * each - 1, total, 1.0, train.lr_warmup_steps, train.lr_schedule) for end in ends]


def first_look(rates: Sequence[float]) -> int | None:
    """Return the first evaluation, from 1, at which a trial with these learning rates may be pruned; None: at none.

    From then on the learning rate does not rise, and loses at most a quarter of its peak.
    """
    for look in range(LEAST_LOOKS, len(rates) + 1):
        now, later = rates[look - 1], rates[look - 1 :]
        if now >= max(later) and now - min(later) <= _LEFT:
            return look
    return None


def note(resolved: Resolved, space: Space) -> str | None:
    """Return a line on the trials that `paired` prunes late or never, by schedule if that varies; None if none."""
    if resolved.config.search.pruner != "paired":
        return None
    looks = len(learning_rates(resolved.config))
    if looks <= LEAST_LOOKS:
        return f"{_PRUNER}: no trial is ever pruned: it has {looks} evaluations; needed: {LEAST_LOOKS + 1}"
    varied = {dimension.key: dimension.distribution for dimension in space.dimensions}.get(_SCHEDULE)
    if isinstance(varied, CategoricalDistribution):
        configs = [overlay(resolved, {_SCHEDULE: schedule}, "space").config for schedule in varied.choices]
        waits = [_wait(config, f"a trial with {_SCHEDULE} = {config.train.lr_schedule}") for config in configs]
    else:
        waits = [_wait(resolved.config, "a trial")]
    told = "; ".join(wait for wait in waits if wait)
    return f"{_PRUNER}: {told}" if told else None


def _wait(config: Config, trial: str) -> str:
    """Return how long the learning rate keeps a trial from being pruned; empty if it does not."""
    rates, schedule = learning_rates(config), config.train.lr_schedule
    look = first_look(rates)
    if look == LEAST_LOOKS:
        return ""
    if look is None or look == len(rates):
        return f"{trial} is never pruned: its learning rate ({schedule}) changes until the end"
    return (
        f"{trial} is not pruned before iteration {look * config.eval.interval} of {config.train.iterations}: until "
        f"then its learning rate ({schedule}) may still bring gains that no curve shows"
    )
