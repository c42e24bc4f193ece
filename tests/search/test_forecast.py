"""What a learning curve may still gain: continued by hand, and on curves that the forecast is exact for."""

from __future__ import annotations

import math

import numpy as np
import pytest

from grpo_mlflow.search import forecast
from grpo_mlflow.search.forecast import Array

RESERVE = 0.08  # of a whole run


def curve(*means: float) -> Array:
    """Eight problems with the same rate at each look, (looks, 8)."""
    return np.repeat(np.array(means)[:, None], 8, axis=1)


def logit(rate: float) -> float:
    """The logit of eight rates, half a success and half a failure added, by hand."""
    return math.log((8 * rate + 0.5) / (8.5 - 8 * rate))


def test_the_logit_of_rates_is_finite() -> None:
    assert forecast.logit([0.5] * 8) == 0
    assert forecast.logit([0.25, 0.75, 0.0, 0.0]) == pytest.approx(math.log(1.5 / 3.5))
    assert forecast.logit([1.0] * 8) == pytest.approx(math.log(8.5 / 0.5))
    assert forecast.logit([0.0] * 8) == pytest.approx(-math.log(8.5 / 0.5))


def test_the_standard_error_by_hand() -> None:
    # Mean .2; squared deviations .01, .01, .04, .04 add up to .1: sqrt(.1 / 3 / 4).
    assert forecast.standard_error([0.1, 0.3, 0.0, 0.4]) == pytest.approx(math.sqrt(0.1 / 12))
    assert forecast.standard_error([0.5] * 4) == 0


def test_a_rise_in_proportion_goes_on_in_proportion() -> None:
    # Logits -.7436, -.5465, -.3594. The mean of the last two, at look 2.5, is .2907 above the start, where the middle
    # stands, too. In proportion to the looks it rises until look 10 by 3 times that.
    rates = curve(0.3, 0.35, 0.4)
    assert forecast.rise(rates, 10, logit(0.3)) == pytest.approx(3 * 0.2907, abs=3e-4)
    # From -.3594 to .5125, a rate of .625; seven of ten looks are left.
    assert forecast.gain(rates, 10, logit(0.3)) == pytest.approx(0.625 - 0.411 + 0.7 * RESERVE, abs=1e-3)


def test_a_rise_that_flattens_out_goes_on_by_its_exponent() -> None:
    # From -2.5366 by 2.0466 at look 2.5 and by 2.1772 at look 5.5: an exponent of ln(2.1772 / 2.0466) / ln(2.2).
    rates = curve(0.02, 0.35, 0.38, 0.4, 0.4, 0.4)
    exponent = math.log(2.1772 / 2.0466) / math.log(2.2)
    assert forecast.rise(rates, 10, logit(0.02)) == pytest.approx(2.1772 * ((10 / 5.5) ** exponent - 1), abs=1e-3)


@pytest.mark.parametrize("exponent", [0.3, 0.6, 1.0])
def test_a_power_law_is_continued_to_its_end(exponent: float) -> None:
    """With many problems and looks, where half a look and half a success are nothing."""
    logits = -1.2 + 2 * (np.arange(1, 201) / 200) ** exponent
    rates = np.repeat(1 / (1 + np.exp(-logits))[:, None], 2000, axis=1)
    for made in (40, 100, 160):
        reached = forecast.logit(rates[made - 1]) + forecast.rise(rates[:made], 200, -1.2)
        assert reached == pytest.approx(0.8, abs=0.03)


def test_a_curve_that_saturates_is_not_forecast_too_low() -> None:
    logits = -1.2 + 2 * (1 - np.exp(-np.arange(1, 41) / 12))
    rates = np.repeat(1 / (1 + np.exp(-logits))[:, None], 2000, axis=1)
    for made in range(3, 40):
        assert forecast.logit(rates[made - 1]) + forecast.rise(rates[:made], 40, -1.2) > logits[-1] - 0.01


@pytest.mark.parametrize("means", [(0.3, 0.3, 0.3, 0.3), (0.6, 0.55, 0.5, 0.5), (0.0,) * 4, (1.0,) * 4, (0.4,)])
def test_one_that_has_not_risen_since_its_middle_stays(means: tuple[float, ...]) -> None:
    assert forecast.rise(curve(*means), 10, logit(0.1)) == 0
    assert forecast.gain(curve(*means), 10, logit(0.1)) == pytest.approx(RESERVE * (10 - len(means)) / 10)


def test_a_sudden_climb_keeps_its_slope() -> None:
    # .3842 per look, twice the mean, for seven looks.
    assert forecast.rise(curve(0.3, 0.3, 0.4), 10, logit(0.3)) == pytest.approx(7 * 0.3842, abs=1e-3)


def test_a_climb_within_the_noise_is_none() -> None:
    rates = np.array([[0.3] * 8, [0.3] * 8, [0.9, 0.0, 0.9, 0.0, 0.9, 0.0, 0.5, 0.0]])  # .1 up, standard error .16
    # The last two logits average .1921 above the start: in proportion, 3 times that.
    assert forecast.rise(rates, 10, logit(0.3)) == pytest.approx(3 * 0.1921, abs=1e-3)


def test_a_climb_less_steep_than_before_is_none() -> None:
    assert forecast.rise(curve(0.1, 0.3, 0.34), 10, logit(0.1)) < 3 * (logit(0.34) - logit(0.1))


def test_what_is_left_shrinks_to_nothing() -> None:
    rates = curve(*np.linspace(0.2, 0.6, 12))
    gains = [forecast.gain(rates, looks, logit(0.2)) for looks in (40, 30, 20, 13)]
    assert gains == sorted(gains, reverse=True)
    assert forecast.gain(curve(0.2, 0.4, 0.4, 0.4), 4, logit(0.2)) < 0.03


def test_late_is_a_part_of_what_came_beyond_the_forecast() -> None:
    # At look 6 it stood at -.7436 and had not risen since the middle; it came to 0.
    rates = curve(0.2, *[0.3] * 7, 0.5, 0.5)
    assert forecast.late(rates, 6, logit(0.2)) == pytest.approx(0.7 * 0.7436, abs=1e-4)


def test_a_trial_that_ended_below_its_forecast_gained_nothing_late() -> None:
    assert forecast.late(curve(0.2, 0.3, 0.4, 0.4, 0.4, 0.4), 3, logit(0.2)) == 0


def test_late_gains_are_added_in_logits() -> None:
    stalled = curve(0.2, 0.3, 0.3, 0.3)
    now = logit(0.3)
    expected = 1 / (1 + math.exp(-now - 0.5)) - 1 / (1 + math.exp(-now)) + 0.6 * RESERVE
    assert forecast.gain(stalled, 10, logit(0.2), 0.5) == pytest.approx(
        expected + forecast.gain(stalled, 10, logit(0.2)) - 0.6 * RESERVE, abs=0.02
    )
    assert forecast.gain(curve(0.3, 0.3, 0.3, 0.3), 10, logit(0.2), 0.5) == pytest.approx(expected)
