"""What a set of evaluations says, and how far it can be trusted.

Estimators are unbiased in the number of replicates; intervals are over problems, because problems, not replicates,
are what a different evaluation set would change. A k larger than the number of replicates cannot be estimated and
raises: lowering it silently would report another quantity under the same name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import stdtrit

from grpo_mlflow.algorithm import intervals

Verdict = Literal["better", "worse", "not distinguishable"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over problems with its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    def stretched(self, factor: float) -> Estimate:
        """Return it with each side of the interval `factor` times as long."""
        low, high = (self.value + factor * (end - self.value) for end in (self.low, self.high))
        return Estimate(self.value, low, high)

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean(values: Sequence[float]) -> float:
    return float(sum(values)) / len(values)


def _check_k(k: int, n: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k = {k} cannot be estimated from {n} replicates; allowed: 1 to {n}")


def pass_at_k(successes: int, replicates: int, k: int) -> float:
    """Return 1 - C(n-c, k) / C(n, k): the chance that k draws hold a success (Chen et al. 2021, eq. 1)."""
    _check_k(k, replicates)
    return 1.0 - math.comb(replicates - successes, k) / math.comb(replicates, k)


def mean_at_k(rewards: Sequence[float], k: int) -> float:
    """Return the unbiased expectation of the best of k rewards drawn without replacement; k = 1 is the mean.

    With r_(1) <= ... <= r_(n): sum_j r_(j) C(j-1, k-1) / C(n, k).
    """
    n = len(rewards)
    _check_k(k, n)
    total = math.comb(n, k)
    return math.fsum(r * (math.comb(j, k - 1) / total) for j, r in enumerate(sorted(rewards)) if j >= k - 1)


def t_quantile(probability: float, degrees: int) -> float:
    """Return the value below which a Student's t with `degrees` degrees of freedom lies with this probability.

    >>> round(t_quantile(0.975, 1), 3)
    12.706
    """
    return float(stdtrit(degrees, probability))


def rate_interval(rates: Sequence[float], replicates: int, k: int = 1) -> Estimate:
    """Return the mean of pass@k of each problem, estimated from `replicates` completions, with its interval."""
    return _estimate(intervals.of_rates(np.asarray(rates, dtype=np.float64), replicates / k))


def mean_interval(
    values: Sequence[float], replicates: int, k: int, known: tuple[float, float], seen: tuple[float, float]
) -> Estimate:
    """Return the mean of mean@k of each problem with its interval.

    Args:
        values: mean@k of each problem, estimated from `replicates` rewards.
        known: the lowest and the highest reward there can be.
        seen: the lowest and the highest single reward there was.
    """
    return _estimate(intervals.of_rewards(np.asarray(values, dtype=np.float64), replicates / k, known, *seen))


def paired_difference(after: Sequence[float], before: Sequence[float]) -> Estimate:
    """Return the mean of after - before over the same problems, with its interval; both are rates in [0, 1].

    Pairing removes the spread between easy and hard problems (Miller 2024, section 4.2).

    Raises:
        ValueError: the two have different lengths.
    """
    if len(after) != len(before):
        raise ValueError(f"paired values must match: {len(after)} and {len(before)}")
    differences = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    return _estimate(intervals.of_differences(differences))


def verdict(difference: Estimate) -> Verdict:
    """Return what a difference means: its interval lies above 0, below 0, or holds 0.

    >>> verdict(Estimate(-0.086, -0.099, -0.073))
    'worse'
    """
    if difference.low > 0:
        return "better"
    return "worse" if difference.high < 0 else "not distinguishable"


def in_words(difference: Estimate, of: str = "problems") -> str:
    """Return a difference with its interval, which is that `of` something, and its verdict, as people are told it.

    >>> in_words(Estimate(-0.086, -0.099, -0.073))
    '-0.086 [-0.099, -0.073]: worse, beyond the noise of problems'
    """
    found = verdict(difference)
    noise = "within" if found == "not distinguishable" else "beyond"
    interval = f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
    return f"{interval}: {found}, {noise} the noise of {of}"


def _estimate(bounds: intervals.Bounds) -> Estimate:
    return Estimate(*map(float, bounds))
