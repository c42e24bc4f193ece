"""Intervals hold for few problems and near 0 and 1, by the simulation of benchmarks/coverage.py at a reduced size."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import coverage


@pytest.mark.parametrize("n", [2, 4, 8, 16, 64])
@pytest.mark.parametrize("replicates", [1, 8])
def test_intervals_hold(n: int, replicates: int) -> None:
    """Signed rewards are left out: where all that was seen is +1, their range is not known (see the full table)."""
    cells = [c for c in coverage.simulate([n], [replicates], 100, seed=1) if c.quantity != "mean@1_signed"]
    assert len(cells) > 100
    missed = sum((1 - cell.coverage) * cell.studies for cell in cells) / sum(cell.studies for cell in cells)
    assert missed < 0.05
    assert [cell for cell in cells if cell.coverage < 0.84] == []  # three and a half standard errors below .93


def test_intervals_of_many_problems_are_no_wider_than_they_have_to_be() -> None:
    cells = coverage.simulate([256], [8], 40, seed=2)
    ratios = [c.width / c.asymptotic for c in cells if c.quantity == "pass@1" and 0.05 <= c.rate[0] <= 0.95]
    assert max(ratios) < 1.15
    assert np.median(ratios) < 1.05


def test_a_narrow_interval_is_seen() -> None:
    cell = coverage.Cell("pass@1", "equal", 2, 1, (0.5,), 0.90, 0.1, 0.1, 1000)
    assert cell.is_narrow  # .90 + 2 * .0081 < .93
    assert not coverage.Cell("pass@1", "equal", 2, 1, (0.5,), 0.92, 0.1, 0.1, 1000).is_narrow


@pytest.mark.parametrize("family", coverage.FAMILIES)
def test_the_population_has_the_rates_that_are_said(family: str) -> None:
    rng = np.random.default_rng(0)
    q = coverage.probabilities(rng, family, 0.3, (1, 200_000))
    for k in (1, 2, 8):
        assert 1 - np.mean((1 - q) ** k) == pytest.approx(coverage.true_pass(family, 0.3, k), abs=0.005)
