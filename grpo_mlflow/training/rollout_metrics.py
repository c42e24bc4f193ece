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
        "truncated_frac": mean([rollout.completion.finish_reason == "length" for rollout in judged]),
        "flat_group_frac": mean([group.is_flat for group in groups]),
        **{f"{name}/{key}": value for name, own in sorted(of_tasks.items()) for key, value in _rewards(own).items()},
    }


def advantage_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Return the mean and the standard deviation of the advantages of groups."""
    advantages = [value for group in groups for value in group.advantages]
    return {"advantage_mean": mean(advantages), "advantage_std": _std(advantages)}


def _rewards(judged: Sequence[Rollout]) -> dict[str, float]:
    """Return the reward and its parts (0 where a rollout lacks one), and the shares right and well formed."""
    rewards = [rollout.verdict.reward for rollout in judged]
    parts = {name for rollout in judged for name in rollout.verdict.parts}
    return {
        "reward_mean": mean(rewards),
        "reward_std": _std(rewards),
        **{f"reward_{part}": mean([r.verdict.parts.get(part, 0.0) for r in judged]) for part in sorted(parts)},
        "success_rate": mean([rollout.verdict.success for rollout in judged]),
        "format_rate": mean([rollout.verdict.parsed is not None for rollout in judged]),
    }


def _std(values: Sequence[float]) -> float:
    centre = mean(values)
    return math.sqrt(sum((value - centre) ** 2 for value in values) / len(values))
