"""Estimators against enumeration, intervals against tables and seeded simulations."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from grpo_mlflow.algorithm.statistics import (
    Estimate,
    mean_at_k,
    mean_interval,
    paired_difference,
    pass_at_k,
    rate_interval,
    t_quantile,
)

ALL_NCK = [(n, c, k) for n in range(1, 7) for c in range(n + 1) for k in range(1, n + 1)]


@pytest.mark.parametrize(("n", "c", "k"), ALL_NCK)
def test_pass_at_k_is_the_share_of_draws_with_a_success(n: int, c: int, k: int) -> None:
    outcomes = [True] * c + [False] * (n - c)
    draws = list(combinations(outcomes, k))
    assert pass_at_k(c, n, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


@pytest.mark.parametrize("n", range(1, 7))
def test_mean_at_k_is_the_average_best_of_k(n: int) -> None:
    rng = np.random.default_rng(n)
    for rewards in (rng.normal(size=n).tolist(), rng.integers(-1, 2, size=n).astype(float).tolist(), [0.135] * n):
        for k in range(1, n + 1):
            draws = list(combinations(rewards, k))
            assert mean_at_k(rewards, k) == pytest.approx(sum(map(max, draws)) / len(draws), abs=1e-12)


def test_mean_at_1_is_the_mean_and_mean_at_n_the_best() -> None:
    rewards = [0.5, -0.2, 1.135, 0.135]
    assert mean_at_k(rewards, 1) == pytest.approx(0.3925)
    assert mean_at_k(rewards, 4) == pytest.approx(1.135)


@pytest.mark.parametrize(("n", "c", "k"), ALL_NCK)
def test_mean_at_k_of_successes_is_pass_at_k(n: int, c: int, k: int) -> None:
    assert mean_at_k([1.0] * c + [0.0] * (n - c), k) == pytest.approx(pass_at_k(c, n, k), abs=1e-12)


def test_pass_at_k_of_many_replicates_is_exact_at_the_ends() -> None:
    assert pass_at_k(0, 5000, 100) == 0.0
    assert pass_at_k(5000, 5000, 100) == 1.0
    assert pass_at_k(1, 5000, 100) == pytest.approx(0.02)


@pytest.mark.parametrize("k", [0, -1, 5, 100])
def test_a_k_that_cannot_be_estimated_raises(k: int) -> None:
    with pytest.raises(ValueError, match=f"k = {k} .*4 replicates; allowed: 1 to 4"):
        pass_at_k(2, 4, k)
    with pytest.raises(ValueError, match=f"k = {k} .*4 replicates; allowed: 1 to 4"):
        mean_at_k([0.0, 1.0, 0.0, 1.0], k)


@pytest.mark.parametrize(
    ("degrees", "table"),
    [
        (1, 12.706),
        (2, 4.303),
        (3, 3.182),
        (4, 2.776),
        (5, 2.571),
        (9, 2.262),
        (15, 2.131),
        (29, 2.045),
        (63, 1.998),
        (120, 1.980),
    ],
)
def test_t_quantile_matches_the_table(degrees: int, table: float) -> None:
    assert t_quantile(0.975, degrees) == pytest.approx(table, abs=5.1e-4)
    assert t_quantile(0.025, degrees) == pytest.approx(-table, abs=5.1e-4)


def test_mean_interval_by_hand() -> None:
    # 1 to 10: mean 5.5, variance 82.5 / 9, so the standard error is sqrt(82.5 / 90) = 0.957427; t(9) = 2.262
    estimate = mean_interval(list(range(1, 11)))
    assert estimate.value == 5.5
    assert estimate.half_width == pytest.approx(2.262157 * 0.957427, rel=1e-6)
    assert estimate.low + estimate.high == pytest.approx(11.0)


def test_mean_interval_of_one_value_is_unbounded_and_of_equal_values_a_point() -> None:
    assert mean_interval([0.25]) == Estimate(0.25, -math.inf, math.inf)
    assert mean_interval([0.25] * 5) == Estimate(0.25, 0.25, 0.25)


def test_rate_interval_of_coins_is_wilsons() -> None:
    # 8 of 10, textbook: (0.4902, 0.9433)
    estimate = rate_interval([1.0] * 8 + [0.0] * 2)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)


def test_rate_interval_keeps_a_width_when_all_or_none_are_solved() -> None:
    # Wilson at p = 1: low = n / (n + z^2) = 64 / (64 + 3.8415) = 0.94338
    all_solved, none_solved = rate_interval([1.0] * 64), rate_interval([0.0] * 64)
    assert (all_solved.value, all_solved.low, all_solved.high) == pytest.approx((1.0, 0.94338, 1.0), abs=1e-5)
    assert (none_solved.value, none_solved.low, none_solved.high) == pytest.approx((0.0, 0.0, 0.05662), abs=1e-5)
    half_solved = rate_interval([0.5] * 64)
    assert half_solved.low < 0.5 < half_solved.high


def test_rate_interval_stays_inside_0_to_1_around_its_value() -> None:
    rng = np.random.default_rng(1)
    for _ in range(500):
        rates = rng.binomial(4, rng.beta(0.2, 0.2), size=int(rng.integers(1, 40))) / 4
        estimate = rate_interval(rates)
        assert 0.0 <= estimate.low <= estimate.value <= estimate.high <= 1.0
        assert estimate.value == pytest.approx(rates.mean())
        assert estimate.high - estimate.low > 0.01


def test_rate_interval_narrows_with_problems_and_with_replicates() -> None:
    rates = [0.0, 0.25, 0.5, 0.75, 1.0, 0.5, 0.25, 0.75]
    coins = [0.0, 1.0] * 4
    assert rate_interval(rates * 4).half_width < 0.6 * rate_interval(rates).half_width
    assert rate_interval([0.5, 0.375, 0.625, 0.5] * 2).half_width < 0.5 * rate_interval(coins).half_width


@pytest.mark.parametrize(("a", "b"), [(2.0, 2.0), (0.5, 0.5), (0.3, 0.9), (1.0, 9.0), (9.0, 1.0), (20.0, 20.0)])
def test_rate_interval_covers_the_true_rate(a: float, b: float) -> None:
    rng = np.random.default_rng(2024)
    trials = 1500
    covered = 0
    for _ in range(trials):
        estimate = rate_interval(rng.binomial(8, rng.beta(a, b, size=64)) / 8)
        covered += estimate.low <= a / (a + b) <= estimate.high
    assert covered / trials >= 0.93


def test_paired_difference_by_hand() -> None:
    # differences 0.1 0.2 0.3 0.2 0.2: mean 0.2, variance 0.02 / 4, standard error sqrt(0.001); t(4) = 2.776
    estimate = paired_difference([0.1, 0.7, 1.3, 0.9, 0.4], [0.0, 0.5, 1.0, 0.7, 0.2])
    assert estimate.value == pytest.approx(0.2)
    assert estimate.half_width == pytest.approx(2.776 * math.sqrt(0.001), rel=0.01)


def test_paired_difference_is_narrower_than_unpaired_when_values_go_together() -> None:
    rng = np.random.default_rng(3)
    before = rng.beta(0.5, 0.5, size=64)
    after = np.clip(before + 0.05 + 0.02 * rng.normal(size=64), 0, 1)
    paired = paired_difference(after.tolist(), before.tolist())
    unpaired = math.hypot(mean_interval(after).half_width, mean_interval(before).half_width)
    assert paired.half_width < 0.2 * unpaired
    assert paired.low > 0
    assert paired.value == pytest.approx(after.mean() - before.mean())


def test_paired_difference_changes_sign_with_its_arguments() -> None:
    forth, back = paired_difference([1.0, 0.5, 0.25], [0.5, 0.5, 0.0]), paired_difference([0.5, 0.5, 0], [1, 0.5, 0.25])
    assert (forth.value, forth.low, forth.high) == pytest.approx((-back.value, -back.high, -back.low))


def test_paired_values_must_match() -> None:
    with pytest.raises(ValueError, match="2 and 3"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])


def test_an_estimate_reads_as_value_and_interval() -> None:
    assert str(Estimate(0.5, 0.25, 1.0)) == "0.500 [0.250, 1.000]"
    assert Estimate(0.5, 0.25, 1.0).half_width == 0.375
