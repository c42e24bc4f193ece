"""Group-relative advantages.

    group  (r - mean_group) / (std_group + eps)    Shao et al. 2024, DeepSeekMath, eq. 4
    batch  (r - mean_group) / (std_batch + eps)    Liu et al. 2025, "Tricks or Traps?" (Lite PPO)
    none    r - mean_group                         Liu et al. 2025, Dr. GRPO
    leave_one_out    r - mean of the other K - 1   Ahmadian et al. 2024, RLOO (arXiv 2402.14740)
                     = K / (K - 1) * (r - mean_group)
    mean   (r - mean_group) / mean_group           Tajwar et al. 2026, MaxRL (arXiv 2602.02710)

`mean` takes rewards of 0 or more, as a mean below 0 would turn the direction. With rewards of 0 and 1, a mean of p
weighs a problem by 1 / p, as the gradient of log p does, while r - mean alone follows that of p. A group without a
success gives zeros, so K rollouts are unbiased for sum_{k < K} grad pass@k / k, the first K - 1 terms of grad log p.
It needs no eps: a group of different rewards has a mean above 0, and its advantages are between -1 and K - 1.

std is the sample standard deviation (K - 1). A group whose rewards are all equal gives exact zeros: equality is
decided by max == min, because dividing the float dust of `r - mean` by a tiny std would give +-1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from grpo_mlflow.algorithm.names import Scale

EPS = 1e-4
DIGITS = 12  # after the point, that `mean` sees of a reward: 1 - .9 - .1 is no reward below 0, nor one to divide by


def group_advantages(
    rewards: NDArray[np.float64], scale: Scale, scored: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """Turn rewards (G, K) into advantages (G, K).

    Rollouts that are not `scored` (G, K; None: all are) are in no mean, no std and no K, and their advantage is 0.

    Raises:
        ValueError: a group has fewer than two rollouts, a reward is not finite, or with `mean` one is below 0.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be (groups, K >= 2), got {rewards.shape}")
    if not np.isfinite(rewards).all():
        raise ValueError("rewards must be finite")
    if scored is not None and not scored.all():
        return _of_scored(rewards, scale, scored)
    if scale == "mean":
        rewards = rewards.round(DIGITS)
        if (rewards < 0).any():
            raise ValueError(f"a mean to divide by takes rewards of 0 or more, got {rewards.min()}")
    flat, mean = rewards.max(axis=1) == rewards.min(axis=1), rewards.mean(axis=1, keepdims=True)
    centred: NDArray[np.float64] = rewards - mean
    centred[flat] = 0.0
    if scale == "none" or flat.all():
        return centred
    if scale == "group":
        centred /= rewards.std(axis=1, ddof=1, keepdims=True) + EPS
    elif scale == "leave_one_out":
        centred *= rewards.shape[1] / (rewards.shape[1] - 1)
    elif scale == "mean":
        centred[~flat] /= mean[~flat]
    else:
        centred /= rewards.std(ddof=1) + EPS
    return centred


def _of_scored(rewards: NDArray[np.float64], scale: Scale, scored: NDArray[np.bool_]) -> NDArray[np.float64]:
    found = np.zeros_like(rewards)
    per_group: Scale = "none" if scale == "batch" else scale
    for own, row, known in zip(found, rewards, scored, strict=True):
        if known.sum() > 1:
            own[known] = group_advantages(row[None, known], per_group)[0]
    if scale == "batch" and found.any():
        found /= rewards[scored].std(ddof=1) + EPS
    return found


def completed(parts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the parts of rewards with the group's mean of each in the place of what does not apply (NaN).

    `parts` (G, K, J) are weight times value of J rewards. A rollout then gains or loses nothing by a reward that it
    lacks: its part of r - mean(group) is 0, where the others' is that of the rollouts that have it. What no rollout of
    a group has is 0 there.
    """
    parts = np.asarray(parts, dtype=np.float64)
    missing = np.isnan(parts)
    if not missing.any():
        return parts
    has = ~missing
    low, high = np.where(has, parts, np.inf).min(axis=1), np.where(has, parts, -np.inf).max(axis=1)
    mean = np.where(has, parts, 0.0).sum(axis=1) / np.maximum(1, has.sum(axis=1))
    # the mean of equal numbers may differ from them by rounding, and would make a signal of it
    mean = np.where(low == high, low, mean)
    return np.where(missing, mean[:, None, :], parts)


def normalized_then_summed(values: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Turn the values (G, K, J) of J rewards, NaN where one does not apply, into advantages (G, K).

    Each reward is normalised within its group before the weighted sum, so that one with large numbers does not hide
    the others; the sums are then normalised over the batch, without those of rollouts that no reward applies to, whose
    advantage is 0:

        z = (r - mean_group) / (std_group + eps)    s = sum_j weight_j z_j    A = (s - mean_batch) / (std_batch + eps)

    This is GDPO (Liu et al. 2026, arXiv 2601.05242), and TRL's `normalize_then_sum`. A reward that fewer than two
    rollouts of a group have says nothing there. `weights` are (G, K, J): those of the rollout's own task.

    Raises:
        ValueError: a group has fewer than two rollouts.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 3 or values.shape[1] < 2:
        raise ValueError(f"values must be (groups, K >= 2, rewards), got {values.shape}")
    has = ~np.isnan(values)
    count = has.sum(axis=1, keepdims=True)
    centred = np.where(has, values - completed(values).mean(axis=1, keepdims=True), 0.0)
    varies = (np.where(has, values, -np.inf).max(axis=1) > np.where(has, values, np.inf).min(axis=1))[:, None, :]
    centred = np.where(varies, centred, 0.0)
    std = np.sqrt((centred**2).sum(axis=1, keepdims=True) / np.maximum(1, count - 1))
    sums: NDArray[np.float64] = np.where(has, weights * centred / (std + EPS), 0.0).sum(axis=2)
    scored = has.any(axis=2)
    if not sums.any():
        return sums
    spread = sums[scored].std(ddof=1)
    found: NDArray[np.float64] = (sums - sums[scored].mean()) / (spread + EPS)
    found[~scored] = 0.0
    found[~sums.any(axis=1)] = 0.0  # without a signal: the mean of all sums is 0 but for rounding
    return found
