"""What rollouts say before any update: rewards, advantages, lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence

from grpo_mlflow.algorithm.statistics import mean
from grpo_mlflow.tasks import member_of
from grpo_mlflow.types import Group, Rollout


def tokens(groups: Sequence[Group]) -> int:
    """Return how many tokens were sampled."""
    return sum(len(rollout.completion.token_ids) for group in groups for rollout in group.rollouts)


def metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Return what the rollouts say before any update: rewards, advantages, lengths.

    Of a mix also each task's own rewards and rates, as `TASK/success_rate` and so on.
    """
    judged = [rollout for group in groups for rollout in group.rollouts]
    lengths = [len(rollout.completion.token_ids) for rollout in judged]
    of_tasks: dict[str, list[Rollout]] = {}
    for group in groups:
        if name := member_of(group.problem.id):
            of_tasks.setdefault(name, []).extend(group.rollouts)
    return {
        **_rewards(judged),
        **advantage_metrics(groups),
        "completion_length_mean": mean(lengths),
        "completion_length_max": float(max(lengths)),
        "truncated_frac": mean([rollout.completion.is_truncated for rollout in judged]),
        "flat_group_frac": mean([group.is_flat for group in groups]),
        **{f"{name}/{key}": value for name, own in sorted(of_tasks.items()) for key, value in _rewards(own).items()},
    }


def advantage_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Return the mean and the standard deviation of the advantages of groups."""
    advantages = [value for group in groups for value in group.advantages]
    return {"advantage_mean": mean(advantages), "advantage_std": _std(advantages)}


def _rewards(judged: Sequence[Rollout]) -> dict[str, float]:
    """Return the reward and its parts, and the shares right and well formed.

    A part is 0 where a rollout lacks it; a reward by name is left out there, and so is the sum where none applies.
    """
    rewards = [r.verdict.reward for r in judged if not _is_unscored(r)] or [0.0]
    named = {name for rollout in judged for name in rollout.verdict.values or ()}
    parts = {name for rollout in judged for name in rollout.verdict.parts} - named
    return {
        "reward_mean": mean(rewards),
        "reward_std": _std(rewards),
        **{f"reward_{part}": mean([r.verdict.parts.get(part, 0.0) for r in judged]) for part in sorted(parts)},
        **{key: value for name in sorted(named) for key, value in _named(judged, name).items()},
        "success_rate": mean([rollout.verdict.success for rollout in judged]),
        "format_rate": mean([rollout.verdict.parsed is not None for rollout in judged]),
    }


def _named(judged: Sequence[Rollout], name: str) -> dict[str, float]:
    """Return what the reward of this name gave to the rollouts that it applies to.

    The mean of its part, which is weight times value, the part's standard deviation, the shares of rollouts with the
    lowest and the highest value that it gave, and the share of rollouts that it applies to.
    """
    verdicts = [rollout.verdict for rollout in judged if name in (rollout.verdict.values or {})]
    values = [value for v in verdicts if (value := (v.values or {})[name]) is not None]
    key = f"reward_{name}"
    applies = {f"{key}_applies": len(values) / len(judged)}
    if not values:
        return applies
    parts = [verdict.parts[name] for verdict in verdicts if name in verdict.parts]
    return {
        key: mean(parts),
        f"{key}_std": _std(parts),
        f"{key}_at_lowest": mean([value == min(values) for value in values]),
        f"{key}_at_highest": mean([value == max(values) for value in values]),
        **applies,
    }


def _is_unscored(rollout: Rollout) -> bool:
    """Return whether rewards by name were asked, and none applies."""
    values = rollout.verdict.values
    return values is not None and all(value is None for name, value in values.items() if name != "overlong")


def _std(values: Sequence[float]) -> float:
    centre = mean(values)
    return math.sqrt(sum((value - centre) ** 2 for value in values) / len(values))
