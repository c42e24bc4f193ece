"""Advantages against hand-computed groups, and the laws that hold for all groups."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from grpo_mlflow.algorithm.advantages import group_advantages
from grpo_mlflow.algorithm.names import Scale

SCALES: tuple[Scale, ...] = ("group", "batch", "none", "leave_one_out", "mean")
EPS = 1e-4


def _random_rewards(groups: int = 20, size: int = 6) -> NDArray[np.float64]:
    """Rewards of 0 or more, as `mean` wants them; a shift makes the others of any sign."""
    return np.abs(np.random.default_rng(0).normal(size=(groups, size)) * 3 + 1)


def test_group_divides_by_each_groups_own_deviation() -> None:
    # group 1: mean 1, squares 1 + 0 + 0 + 1 = 2, std sqrt(2/3); group 2: mean 2, squares 4 * 4 = 16, std sqrt(16/3)
    result = group_advantages(np.array([[0.0, 1.0, 1.0, 2.0], [4.0, 4.0, 0.0, 0.0]]), "group")
    a = 1 / (math.sqrt(2 / 3) + EPS)
    b = 2 / (math.sqrt(16 / 3) + EPS)
    assert a == pytest.approx(1.224595, abs=1e-6)
    assert b == pytest.approx(0.865988, abs=1e-6)
    np.testing.assert_allclose(result, [[-a, 0, 0, a], [b, b, -b, -b]], rtol=1e-12)


def test_batch_divides_all_groups_by_one_deviation() -> None:
    # means 1 and 3; over the batch 0 2 1 5: mean 2, squares 4 + 0 + 1 + 9 = 14, std sqrt(14/3) = 2.160247
    result = group_advantages(np.array([[0.0, 2.0], [1.0, 5.0]]), "batch")
    unit = 1 / (2.1602468994692867 + EPS)
    np.testing.assert_allclose(result, [[-unit, unit], [-2 * unit, 2 * unit]], rtol=1e-12)


def test_batch_deviation_counts_flat_groups() -> None:
    # over the batch 0 2 1 1: mean 1, squares 1 + 1 = 2, std sqrt(2/3)
    result = group_advantages(np.array([[0.0, 2.0], [1.0, 1.0]]), "batch")
    unit = 1 / (math.sqrt(2 / 3) + EPS)
    np.testing.assert_allclose(result[0], [-unit, unit], rtol=1e-12)
    assert result[1].tolist() == [0.0, 0.0]


def test_none_only_centres() -> None:
    result = group_advantages(np.array([[0.0, 2.0, 4.0], [1.0, 1.0, -5.0]]), "none")
    assert result.tolist() == [[-2.0, 0.0, 2.0], [2.0, 2.0, -4.0]]


def test_leave_one_out_compares_each_with_the_mean_of_the_others() -> None:
    # the others of 0 2 4: means 3 2 1; those of 1 1 -5: means -2 -2 1
    result = group_advantages(np.array([[0.0, 2.0, 4.0], [1.0, 1.0, -5.0]]), "leave_one_out")
    assert result.tolist() == [[-3.0, 0.0, 3.0], [3.0, 3.0, -6.0]]
    rewards = _random_rewards()
    others = (rewards.sum(axis=1, keepdims=True) - rewards) / (rewards.shape[1] - 1)
    np.testing.assert_allclose(group_advantages(rewards, "leave_one_out"), rewards - others, atol=1e-12)


def test_mean_divides_by_each_groups_own_mean() -> None:
    # means 1 and 0.25; a group without any reward has no signal
    result = group_advantages(np.array([[0.0, 1.0, 1.0, 2.0], [0.0, 0.0, 0.0, 1.0], [0.0] * 4]), "mean")
    assert result.tolist() == [[-1.0, 0.0, 0.0, 1.0], [-1.0, -1.0, -1.0, 3.0], [0.0] * 4]


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_mean_is_unbiased_for_the_first_terms_of_maximum_likelihood(p: float, size: int) -> None:
    """MaxRL over all outcomes of K rollouts that succeed with p = 1 / (1 + exp(-x)), whose scores are 1 - p and -p."""
    expected = 0.0
    for outcome in itertools.product([0.0, 1.0], repeat=size):
        rewards = np.array([outcome])
        chance = float(np.prod(np.where(rewards == 1, p, 1 - p)))
        scores = np.where(rewards == 1, 1 - p, -p)
        expected += chance * float((group_advantages(rewards, "mean") * scores).mean())
    slope = p * (1 - p)  # dp / dx
    terms = [(1 - p) ** (k - 1) * slope for k in range(1, size)]  # of pass@k = 1 - (1 - p)^k, over k
    assert expected == pytest.approx(sum(terms), rel=1e-12)


@pytest.mark.parametrize("dust", [1 - 0.9 - 0.1, 0.1 + 0.2 - 0.3])  # -2.8e-17 and 5.6e-17
def test_the_rounding_of_a_sum_is_no_reward(dust: float) -> None:
    assert dust
    assert group_advantages(np.array([[dust, 0.0, 0.0]]), "mean").tolist() == [[0.0, 0.0, 0.0]]
    assert group_advantages(np.array([[dust, 1.0]]), "mean").tolist() == [[-1.0, 1.0]]


@pytest.mark.parametrize("rewards", [[[0.0, -0.2, 1.0]], [[1.0, 1.0], [-1.0, -1.0]]])
def test_a_mean_of_negative_rewards_divides_nothing(rewards: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="rewards of 0 or more"):
        group_advantages(np.array(rewards), "mean")


@pytest.mark.parametrize("scale", SCALES)
def test_every_group_sums_to_zero(scale: Scale) -> None:
    result = group_advantages(_random_rewards(), scale)
    np.testing.assert_allclose(result.sum(axis=1), 0.0, atol=1e-12)
    assert np.abs(result).max() > 0.1


@pytest.mark.parametrize("scale", SCALES)
def test_better_rewards_get_larger_advantages(scale: Scale) -> None:
    rewards = _random_rewards()
    assert (np.argsort(group_advantages(rewards, scale)) == np.argsort(rewards)).all()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("size", [2, 3, 6, 7, 12])
@pytest.mark.parametrize("reward", [0.1, 0.3, 1 / 3, 1e-9, 1e9, -0.7, 0.0])
def test_equal_rewards_give_exact_zeros(reward: float, size: int, scale: Scale) -> None:
    flat = np.full((1, size), abs(reward) if scale == "mean" else reward)
    assert group_advantages(flat, scale).tolist() == [[0.0] * size]
    mixed = np.concatenate([_random_rewards(2, size), flat, _random_rewards(1, size)])
    result = group_advantages(mixed, scale)
    assert result[2].tolist() == [0.0] * size
    assert (result[[0, 1, 3]] != 0).all()


@pytest.mark.parametrize("scale", ["group", "none", "leave_one_out", "mean"])
def test_other_groups_do_not_matter(scale: Scale) -> None:
    rewards = _random_rewards(3)
    alone = np.concatenate([group_advantages(row[None], scale) for row in rewards])
    np.testing.assert_allclose(group_advantages(rewards, scale), alone, rtol=1e-12)


@pytest.mark.parametrize("scale", SCALES)
def test_almost_equal_rewards_give_almost_zero(scale: Scale) -> None:
    rewards = np.array([[0.1 + 0.2, 0.3, 0.3, 0.3]])
    assert rewards.max() > rewards.min()
    assert np.abs(group_advantages(rewards, scale)).max() < 1e-9


@pytest.mark.parametrize("scale", [scale for scale in SCALES if scale != "mean"])
@pytest.mark.parametrize("shift", [-3.0, 0.25, 1000.0])
def test_a_constant_added_to_all_rewards_changes_nothing(scale: Scale, shift: float) -> None:
    rewards = _random_rewards()
    np.testing.assert_allclose(
        group_advantages(rewards + shift, scale), group_advantages(rewards, scale), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("scale", SCALES)
def test_the_rewards_stay_as_they_were(scale: Scale) -> None:
    rewards = np.array([[0.0, 1.0], [1.0, 1.0]])
    group_advantages(rewards, scale)
    assert rewards.tolist() == [[0.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scale", SCALES)
def test_a_reward_that_is_not_finite_is_refused(scale: Scale, bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        group_advantages(np.array([[0.0, 1.0], [bad, 1.0]]), scale)


@pytest.mark.parametrize("rewards", [[[1.0], [2.0]], [1.0, 2.0]], ids=["one rollout", "no groups"])
@pytest.mark.parametrize("scale", SCALES)
def test_a_group_needs_two_rollouts(scale: Scale, rewards: list[float]) -> None:
    with pytest.raises(ValueError, match="K >= 2"):
        group_advantages(np.array(rewards), scale)
