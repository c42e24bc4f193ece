"""Group-relative advantages.

    group  (r - mean_group) / (std_group + eps)    Shao et al. 2024, DeepSeekMath, eq. 4
    batch  (r - mean_group) / (std_batch + eps)    Liu et al. 2025, "Tricks or Traps?" (Lite PPO)
    none    r - mean_group                         Liu et al. 2025, Dr. GRPO
    leave_one_out    r - mean of the other K - 1   Ahmadian et al. 2024, RLOO (arXiv 2402.14740)
                     = K / (K - 1) * (r - mean_group)

std is the sample standard deviation (K - 1). A group whose rewards are all equal gives exact zeros: equality is
decided by max == min, because dividing the float dust of `r - mean` by a tiny std would give +-1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from grpo_mlflow.algorithm.names import Scale

EPS = 1e-4


def group_advantages(rewards: NDArray[np.float64], scale: Scale) -> NDArray[np.float64]:
    """Turn rewards (G, K) into advantages (G, K).

    Raises:
        ValueError: a group has fewer than two rollouts, or a reward is not finite.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be (groups, K >= 2), got {rewards.shape}")
    if not np.isfinite(rewards).all():
        raise ValueError("rewards must be finite")
    flat = rewards.max(axis=1) == rewards.min(axis=1)
    centred: NDArray[np.float64] = rewards - rewards.mean(axis=1, keepdims=True)
    centred[flat] = 0.0
    if scale == "none" or flat.all():
        return centred
    if scale == "group":
        centred /= rewards.std(axis=1, ddof=1, keepdims=True) + EPS
    elif scale == "leave_one_out":
        centred *= rewards.shape[1] / (rewards.shape[1] - 1)
    else:
        centred /= rewards.std(ddof=1) + EPS
    return centred
