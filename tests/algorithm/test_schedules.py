"""The learning rate reaches its peak and decays as named; the KL coefficient moves the right way, within limits."""

from __future__ import annotations

import math

import pytest

from grpo_mlflow.algorithm.names import Schedule
from grpo_mlflow.algorithm.schedules import adapt_kl_coef, learning_rate

SCHEDULES: tuple[Schedule, ...] = ("constant", "linear", "cosine")


def _rates(total: int, peak: float, warmup: int, schedule: Schedule) -> list[float]:
    return [learning_rate(step, total, peak, warmup, schedule) for step in range(total)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_by_hand(schedule: Schedule) -> None:
    assert _rates(10, 8.0, 4, schedule)[:5] == [2.0, 4.0, 6.0, 8.0, 8.0]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 2, 7, 19])
def test_no_step_is_wasted_and_the_peak_is_reached_but_not_exceeded(warmup: int, schedule: Schedule) -> None:
    rates = _rates(20, 3e-4, warmup, schedule)
    assert min(rates) > 0
    assert max(rates) == pytest.approx(3e-4)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


def test_constant_stays() -> None:
    assert _rates(5, 0.5, 0, "constant") == [0.5] * 5


def test_linear_by_hand() -> None:
    assert _rates(4, 1.0, 0, "linear") == [1.0, 0.75, 0.5, 0.25]
    assert _rates(6, 1.0, 2, "linear") == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert learning_rate(4, 4, 1.0, 0, "linear") == 0.0


def test_cosine_by_hand() -> None:
    # (1 + cos(0)) / 2, (1 + sqrt(1/2)) / 2, (1 + 0) / 2, (1 - sqrt(1/2)) / 2
    assert _rates(4, 2.0, 0, "cosine") == pytest.approx([2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5)])
    assert learning_rate(4, 4, 2.0, 0, "cosine") == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_peak_scales_every_step(schedule: Schedule) -> None:
    assert _rates(9, 6.0, 3, schedule) == pytest.approx([6 * rate for rate in _rates(9, 1.0, 3, schedule)])


def test_a_run_of_one_step_uses_the_peak() -> None:
    assert [learning_rate(0, 1, 0.1, 0, schedule) for schedule in SCHEDULES] == [0.1, 0.1, 0.1]


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (0.0, 0.49),  # error -1 limited to -0.2: 0.5 * (1 - 0.2 / 10)
        (1.6, 0.49),  # error -0.2
        (1.8, 0.495),  # error -0.1: 0.5 * (1 - 0.1 / 10)
        (2.0, 0.5),
        (2.2, 0.505),
        (2.4, 0.51),
        (1e9, 0.51),
        (math.inf, 0.51),
    ],
)
def test_kl_coefficient_by_hand(kl: float, expected: float) -> None:
    assert adapt_kl_coef(0.5, kl, target=2.0, horizon=10.0) == pytest.approx(expected, rel=1e-12)


def test_kl_coefficient_is_steady_at_the_target() -> None:
    assert adapt_kl_coef(0.037, 0.1, target=0.1, horizon=3.0) == 0.037


@pytest.mark.parametrize("horizon", [1.0, 10.0, 1000.0])
def test_kl_coefficient_stays_positive_and_follows_the_kl(horizon: float) -> None:
    falling = rising = 0.05
    for _ in range(200):
        lower, higher = adapt_kl_coef(falling, 0.0, 0.1, horizon), adapt_kl_coef(rising, 5.0, 0.1, horizon)
        assert 0 < lower < falling
        assert higher > rising
        falling, rising = lower, higher


def test_a_longer_horizon_moves_less() -> None:
    moves = [adapt_kl_coef(1.0, 9.0, 1.0, horizon) - 1.0 for horizon in (1.0, 2.0, 20.0)]
    assert moves == pytest.approx([0.2, 0.1, 0.01])
