"""95% intervals over problems that hold for few problems, and for rates near 0 and 1.

All are made of one: a Clopper-Pearson interval at the effective number of problems, for values in [0, 1] (Korn and
Graubard 1998, "Confidence intervals for proportions with small expected number of positive counts estimated from
survey data", Survey Methodology 24, 193-201). Values of several replicates vary less than coins, so the mean p of n
values is worth

    n_eff = p (1 - p) / SE^2 * (z / t)^2        SE^2 = s^2 / n; z, t: the 0.975 quantiles

coins, which may be a fraction. t has the degrees of freedom of the variance s^2, which a few far values decide if most
others are equal. With G the unbiased excess kurtosis, 0 at least (O'Neill 2014, "Some useful moment results in
sampling problems", The American Statistician 68, 282-296; G is G_2 of Joanes and Gill 1998):

    degrees = 2 / (2 / (n - 1) + G / n)

Among all values in [0, 1] with a given mean coins vary most, so n_eff is n at least: a sample whose values happen to be
equal, or all 0, has the interval of n coins. It is n times the replicates at most, and n^2 / 4: that a few values are
nearly equal does not show that no other kind of problem exists. (8 problems of which a fifth is solved always and the
others never, with some points for form, are covered in 86% with n^2 / 2, by benchmarks/coverage.py.) What is estimated
from groups of k replicates, as pass@k, has replicates / k for them: a problem of 8 has four pairs that share nothing.

Arrays have problems on their last axis; the functions return mean, low and high, without that axis.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv, stdtrit

CONFIDENCE = 0.95
_TAIL = (1 - CONFIDENCE) / 2
_Z = NormalDist().inv_cdf(1 - _TAIL)
_TINY = 1e-12  # a sum of squares below it is rounding

Array = NDArray[np.float64]
Bounds = tuple[Array, Array, Array]


def of_rates(rates: Array, replicates: float) -> Bounds:
    """Return the interval of the mean of values in [0, 1], each of `replicates` independent draws; rates: (..., n)."""
    mean, n = np.asarray(rates.mean(axis=-1)), rates.shape[-1]
    return (mean, *_exact(mean, np.minimum(_effective_size(rates), n * replicates)))


def of_rewards(
    values: Array, replicates: float, known: tuple[float, float], lowest: Array | float, highest: Array | float
) -> Bounds:
    """Return the interval of the mean of values in the `known` range of rewards; values: (..., n).

    Scaled to [0, 1] it is that of rates. Where the lowest or the highest reward that was seen lies outside the known
    range, this end is known only as far as it was seen: it is stretched to that, and the interval is the hull of the
    one that has this range and of Student's t, which may leave it.
    """
    low, high = np.minimum(lowest, known[0]), np.maximum(highest, known[1])
    width = high - low
    scaled = (values - np.expand_dims(low, -1)) / np.expand_dims(width, -1)
    mean, below, above = (low + width * bound for bound in of_rates(np.clip(scaled, 0.0, 1.0), replicates))
    n = values.shape[-1]
    if n > 1:
        half = stdtrit(n - 1, 1 - _TAIL) * values.std(axis=-1, ddof=1) / np.sqrt(n)
        below = np.where(low < known[0], np.minimum(below, mean - half), below)
        above = np.where(high > known[1], np.maximum(above, mean + half), above)
    return mean, below, above


def of_differences(differences: Array) -> Bounds:
    """Return the interval of the mean of paired differences in [-1, 1]; differences: (..., n).

    Gains and losses each have an interval, p1 in [l1, u1] and p2 in [l2, u2], and those are combined as for
    a difference of paired proportions (Newcombe 1998, "Improved confidence intervals for the difference between
    binomial proportions based on paired data", Statistics in Medicine 17, 2635-2650; Zou and Donner 2008, Statistics
    in Medicine 27, 1693-1702):

        low  = p1 - p2 - sqrt((p1 - l1)^2 + (u2 - p2)^2 - 2 r (p1 - l1) (u2 - p2))       high: with u1 and l2

    A problem gains or loses, never both, so Cov(p1, p2) = -p1 p2 / n, and r < 0. It is taken at the limits (l1, u2),
    not at (p1, p2): there it is known even if all problems gained. Few problems that all gained then say no more than
    the sign test does. Where none lost, up to 3.7 / n may lose all that they had and not have been seen; so a small
    gain of every problem needs some hundred problems to be told from nothing.
    """
    n = differences.shape[-1]
    gains, losses = np.maximum(differences, 0.0), np.maximum(-differences, 0.0)
    p1, p2 = np.asarray(gains.mean(axis=-1)), np.asarray(losses.mean(axis=-1))
    n1, n2 = _effective_size(gains), _effective_size(losses)
    (l1, u1), (l2, u2) = _exact(p1, n1), _exact(p2, n2)
    share = np.sqrt(n1 * n2) / n  # of -r, which is 1 for coins that always fall on different sides
    mean = p1 - p2
    below = mean - _combined(p1 - l1, u2 - p2, share * _odds_root(l1, u2))
    above = mean + _combined(u1 - p1, p2 - l2, share * _odds_root(u1, l2))
    return mean, np.maximum(below, -1.0), np.minimum(above, 1.0)


def _effective_size(values: Array) -> Array:
    """Return how many coins the values in [0, 1] are worth: one each at least."""
    n = values.shape[-1]
    mean = np.asarray(values.mean(axis=-1))
    away = values - mean[..., None]
    second, fourth = np.asarray((away**2).mean(axis=-1)), np.asarray((away**4).mean(axis=-1))
    varies = second * n > _TINY
    known = np.where(varies, second, 1.0)
    excess = np.zeros_like(mean)
    if n > 3:
        biased = np.where(varies, fourth / known**2 - 3, 0.0)
        excess = np.maximum(0.0, ((n + 1) * biased + 6) * (n - 1) / ((n - 2) * (n - 3)))
    degrees = 2 / (2 / max(1, n - 1) + excess / n)
    coins = mean * (1 - mean) * (n - 1) / known * (_Z / stdtrit(degrees, 1 - _TAIL)) ** 2
    return np.asarray(np.where(varies, np.clip(coins, n, max(n, n * n / 4)), n))


def _exact(mean: Array, size: Array) -> tuple[Array, Array]:
    """Return the Clopper-Pearson interval of `size` coins of which the share `mean` succeeded."""
    good, bad = mean * size, (1 - mean) * size
    low = np.where(good > _TINY, betaincinv(np.maximum(good, _TINY), bad + 1, _TAIL), 0.0)
    high = np.where(bad > _TINY, betaincinv(good + 1, np.maximum(bad, _TINY), 1 - _TAIL), 1.0)
    return np.minimum(low, mean), np.maximum(high, mean)


def _odds_root(a: Array, b: Array) -> Array:
    """Return sqrt(a / (1 - a) * b / (1 - b)), huge where one of them is 1."""
    return np.asarray(np.sqrt(a * b / np.maximum((1 - a) * (1 - b), _TINY**2)))


def _combined(a: Array, b: Array, opposed: Array) -> Array:
    """Return sqrt(a^2 + b^2 + 2 opposed a b), opposed being -r: 1 at most."""
    return np.asarray(np.sqrt(a * a + b * b + 2 * np.minimum(opposed, 1.0) * a * b))
