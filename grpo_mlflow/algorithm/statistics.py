"""What a set of evaluations says, and how far it can be trusted.

Estimators are unbiased in the number of replicates; intervals are over problems, because problems, not replicates,
are what a different evaluation set would change. A k larger than the number of replicates cannot be estimated and
raises: lowering it silently would report another quantity under the same name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over problems with its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

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


def mean_interval(values: Sequence[float] | NDArray[np.float64]) -> Estimate:
    """Return the mean with Student's t interval; one value alone has an unbounded one."""
    x = np.asarray(values, dtype=np.float64)
    mean = float(x.mean())
    if len(x) < 2:
        return Estimate(mean, -math.inf, math.inf)
    half = t_quantile(0.5 + CONFIDENCE / 2, len(x) - 1) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return Estimate(mean, mean - half, mean + half)


def rate_interval(values: Sequence[float] | NDArray[np.float64]) -> Estimate:
    """Return the mean of per-problem rates in [0, 1] with a Wilson score interval at the effective sample size.

    A problem's rate from several replicates varies less than a coin: n_eff = p (1 - p) / SE^2 (Kish's design effect),
    never below the number of problems. Unlike mean +- SE it stays inside [0, 1] and keeps a width when all problems
    are solved.
    """
    x = np.asarray(values, dtype=np.float64)
    n = len(x)
    p = float(x.mean())
    variance_of_mean = float(x.var(ddof=1)) / n if n > 1 else 0.0
    spread = p * (1 - p)
    n_eff = max(n, spread / variance_of_mean) if variance_of_mean > 0 and spread > 0 else float(n)
    z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    centre = (p + z * z / (2 * n_eff)) / (1 + z * z / n_eff)
    half = z / (1 + z * z / n_eff) * math.sqrt(spread / n_eff + z * z / (4 * n_eff * n_eff))
    return Estimate(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)))


def paired_difference(after: Sequence[float], before: Sequence[float]) -> Estimate:
    """Return the mean of after - before over the same problems, with its t interval.

    Pairing removes the spread between easy and hard problems (Miller 2024, section 4.2).

    Raises:
        ValueError: the two have different lengths.
    """
    if len(after) != len(before):
        raise ValueError(f"paired values must match: {len(after)} and {len(before)}")
    return mean_interval(np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64))
