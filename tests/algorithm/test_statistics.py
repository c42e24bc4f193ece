"""Estimators against enumeration, intervals against tables."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from grpo_mlflow.algorithm.statistics import (
    Estimate,
    in_words,
    mean_at_k,
    mean_interval,
    paired_difference,
    pass_at_k,
    rate_interval,
    t_quantile,
    verdict,
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


def test_rate_interval_of_coins_is_clopper_and_pearsons() -> None:
    # 8 of 10 and 9 of 10, textbook tables: (0.4439, 0.9748) and (0.5550, 0.9975)
    eight, nine = rate_interval([1.0] * 8 + [0.0] * 2, 1), rate_interval([1.0] * 9 + [0.0], 1)
    assert (eight.value, eight.low, eight.high) == pytest.approx((0.8, 0.4439, 0.9748), abs=1e-4)
    assert (nine.value, nine.low, nine.high) == pytest.approx((0.9, 0.5550, 0.9975), abs=1e-4)


def test_rate_interval_keeps_a_width_when_all_or_none_are_solved() -> None:
    # all of n: low = .025 ** (1 / n), for 64 .94401; for 1 .025
    all_solved, none_solved = rate_interval([1.0] * 64, 8), rate_interval([0.0] * 64, 8)
    assert (all_solved.value, all_solved.low, all_solved.high) == pytest.approx((1.0, 0.94400, 1.0), abs=1e-5)
    assert (none_solved.value, none_solved.low, none_solved.high) == pytest.approx((0.0, 0.0, 0.05600), abs=1e-5)
    one = rate_interval([1.0], 8)
    assert (one.value, one.low, one.high) == pytest.approx((1.0, 0.025, 1.0))


def test_rate_interval_of_many_rates_is_the_normal_one() -> None:
    # 500 x .25 and 500 x .75: s = .25 (n - 1 in the denominator), SE = .25 / sqrt(999) = .0079096; times 1.9623 (t)
    estimate = rate_interval([0.25, 0.75] * 500, 8)
    assert estimate.half_width == pytest.approx(1.9623 * 0.0079096, rel=0.02)


def test_equal_rates_have_the_interval_of_coins() -> None:
    # no spread was seen, so the interval is that of 64 coins of which 32 fall right: (.3723, .6277)
    estimate = rate_interval([0.5] * 64, 8)
    assert (estimate.low, estimate.high) == pytest.approx((0.3723, 0.6277), abs=1e-4)


def test_rates_are_worth_their_replicates_at_most() -> None:
    nearly_equal = [0.5] * 63 + [0.5001, 0.4999]
    assert rate_interval(nearly_equal, 4).half_width == pytest.approx(rate_interval([1, 0] * 130, 1).half_width)


def test_a_few_far_rates_widen_the_interval() -> None:
    """Where one problem makes the spread, the spread is hardly known: the interval is that of coins."""
    one_far = [0.0] * 15 + [0.8]
    p, n = 0.05, 16
    assert rate_interval(one_far, 8).high > p + 2.131 * float(np.std(one_far, ddof=1)) / math.sqrt(n)
    assert rate_interval(one_far, 8) == rate_interval(one_far, 1)


def test_rate_interval_stays_inside_0_to_1_around_its_value() -> None:
    rng = np.random.default_rng(1)
    for _ in range(500):
        rates = rng.binomial(4, rng.beta(0.2, 0.2), size=int(rng.integers(1, 40))) / 4
        estimate = rate_interval(rates.tolist(), 4)
        assert 0.0 <= estimate.low <= estimate.value <= estimate.high <= 1.0
        assert estimate.value == pytest.approx(rates.mean())
        assert estimate.high - estimate.low > 0.01


def test_rate_interval_narrows_with_problems_and_with_replicates() -> None:
    rates = [0.0, 0.25, 0.5, 0.75, 1.0, 0.5, 0.25, 0.75]
    assert rate_interval(rates * 4, 4).half_width < 0.6 * rate_interval(rates, 4).half_width
    coins = [0.0, 1.0] * 16
    assert rate_interval([0.5, 0.375, 0.625, 0.5] * 8, 8).half_width < 0.5 * rate_interval(coins, 8).half_width


def test_rewards_between_0_and_1_have_the_interval_of_rates() -> None:
    rewards = [0.1, 1.0, 1.0, 0.55, 0.1, 1.0]
    assert mean_interval(rewards, 2, 1, (0.0, 1.0), (0.1, 1.0)) == rate_interval(rewards, 2)


def test_rewards_beyond_0_to_1_have_the_range_that_was_seen() -> None:
    """Wins and losses are rates on a longer scale; where all are won, the width remains."""
    games = [1.0] * 8 + [-1.0] * 2
    rates, estimate = rate_interval([1.0] * 8 + [0.0] * 2, 1), mean_interval(games, 1, 1, (0.0, 1.0), (-1.0, 1.0))
    assert estimate.value == pytest.approx(0.6)
    assert estimate.high == pytest.approx(2 * rates.high - 1)
    # below, the range is not known: the t interval, .6 - 2.2622 * .8433 / sqrt(10) = -.0033, unless that is shorter
    assert estimate.low == pytest.approx(min(2 * rates.low - 1, -0.0033), abs=1e-4)
    points = mean_interval([5.0] * 64, 4, 1, (0.0, 1.0), (5.0, 5.0))
    assert (points.low, points.high) == pytest.approx((5 * 0.94400, 5.0), abs=1e-4)


def test_rewards_of_a_known_range_have_the_interval_of_rates_on_its_scale() -> None:
    """Two games that were both won do not show that none is lost: a task says so (two coins: .025^(1/2) = .1581)."""
    rates, games = rate_interval([1.0, 1.0], 1), mean_interval([1.0, 1.0], 1, 1, (-1.0, 1.0), (1.0, 1.0))
    assert (games.low, games.high) == pytest.approx((2 * rates.low - 1, 1.0))
    assert rates.low == pytest.approx(0.15811, abs=1e-5)


def test_pass_at_2_of_8_counts_the_pairs_that_share_nothing() -> None:
    """511 problems are solved, and one fails twice of eight times: 1 - 1/28. Four pairs each, so 2048 coins at most."""
    rates = [1.0] * 511 + [1 - 1 / 28]
    assert rate_interval(rates, 8, 2) == rate_interval(rates, 4)
    assert rate_interval(rates, 8, 2).low < rate_interval(rates, 8).low


def test_rewards_beyond_1_may_have_more_than_was_seen() -> None:
    # 1 to 10: mean 5.5, variance 82.5 / 9, so the standard error is sqrt(82.5 / 90) = 0.957427; t(9) = 2.262157
    estimate = mean_interval([float(i) for i in range(1, 11)], 1, 1, (0.0, 1.0), (1.0, 10.0))
    assert estimate.high >= 5.5 + 2.262157 * 0.957427 - 1e-6
    one = mean_interval([7.0], 1, 1, (0.0, 1.0), (7.0, 7.0))
    assert (one.value, one.low, one.high) == pytest.approx((7.0, 0.175, 7.0))


def test_a_paired_difference_of_many_problems_is_the_normal_one() -> None:
    # 400 x +.5, 200 x -.5, 400 x 0: mean .1, variance .14 (1000 / 999), SE .011838; times 1.9623 (t)
    after = [0.75] * 400 + [0.25] * 200 + [0.5] * 400
    before = [0.25] * 400 + [0.75] * 200 + [0.5] * 400
    estimate = paired_difference(after, before)
    assert estimate.value == pytest.approx(0.1)
    assert estimate.half_width == pytest.approx(1.9623 * 0.011838, rel=0.02)


@pytest.mark.parametrize(("n", "better"), [(2, False), (4, False), (5, False), (6, True), (64, True)])
def test_problems_that_all_gain_say_what_the_sign_test_does(n: int, better: bool) -> None:
    # the sign test's p is 2 ** (1 - n): .0625 for 5, .03125 for 6
    forth, back = paired_difference([1.0] * n, [0.0] * n), paired_difference([0.0] * n, [1.0] * n)
    assert (forth.value, forth.high, back.low) == (1.0, 1.0, -1.0)
    assert (verdict(forth), verdict(back)) == (("better", "worse") if better else ("not distinguishable",) * 2)
    # low = l1 - u2 with l1 = .025 ** (1 / n) and u2 = 1 - l1 while these odds exclude each other
    if n < 64:
        assert forth.low == pytest.approx(2 * 0.025 ** (1 / n) - 1, abs=1e-9)


def test_problems_that_all_score_as_before_leave_a_width() -> None:
    # neither gains nor losses: each end is that of 64 coins of which none fell, .05600
    estimate = paired_difference([0.5] * 64, [0.5] * 64)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0.0, -0.05600, 0.05600), abs=1e-5)


def test_paired_difference_is_narrower_than_unpaired_when_values_go_together() -> None:
    rng = np.random.default_rng(3)
    before = rng.beta(0.5, 0.5, size=256)
    after = np.clip(before + 0.05 + 0.02 * rng.normal(size=256), 0, 1)
    paired = paired_difference(after.tolist(), before.tolist())
    unpaired = math.hypot(*(rate_interval(rates.tolist(), 64).half_width for rates in (after, before)))
    assert paired.half_width < 0.3 * unpaired
    assert paired.low > 0
    assert paired.value == pytest.approx(after.mean() - before.mean())


def test_paired_difference_changes_sign_with_its_arguments() -> None:
    forth, back = paired_difference([1.0, 0.5, 0.25], [0.5, 0.5, 0.0]), paired_difference([0.5, 0.5, 0], [1, 0.5, 0.25])
    assert (forth.value, forth.low, forth.high) == pytest.approx((-back.value, -back.high, -back.low))


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        (Estimate(-0.086, -0.099, -0.073), "-0.086 [-0.099, -0.073]: worse, beyond the noise of problems"),
        (Estimate(0.08, 0.071, 0.089), "+0.080 [+0.071, +0.089]: better, beyond the noise of problems"),
        (Estimate(0.01, -0.01, 0.03), "+0.010 [-0.010, +0.030]: not distinguishable, within the noise of problems"),
        (Estimate(0.0, 0.0, 0.0), "+0.000 [+0.000, +0.000]: not distinguishable, within the noise of problems"),
    ],
)
def test_a_difference_is_better_worse_or_not_distinguishable(difference: Estimate, words: str) -> None:
    assert in_words(difference) == words


def test_a_stretched_interval_has_longer_sides() -> None:
    stretched = Estimate(0.5, 0.25, 1.0).stretched(2)
    assert (stretched.value, stretched.low, stretched.high) == (0.5, 0.0, 1.5)


def test_paired_values_must_match() -> None:
    with pytest.raises(ValueError, match="2 and 3"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])


def test_an_estimate_reads_as_value_and_interval() -> None:
    assert str(Estimate(0.5, 0.25, 1.0)) == "0.500 [0.250, 1.000]"
    assert Estimate(0.5, 0.25, 1.0).half_width == 0.375
