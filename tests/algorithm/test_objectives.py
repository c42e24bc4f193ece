"""Several rewards become one advantage: what does not apply leaves it to the others, and each may be normalised first.

Numbers marked TRL are what the code of TRL 1.16.0 (GRPOTrainer) gives for the same values.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from grpo_mlflow.algorithm.advantages import completed, group_advantages, normalized_then_summed
from grpo_mlflow.algorithm.names import Scale

NAN = math.nan
EXAMPLE = np.array([[[0.0, 1.0], [1.0, NAN], [2.0, 1.0], [3.0, NAN]]])
MANY = np.array(
    [
        [[0.0, 100.0], [1.0, 100.0], [0.0, 300.0], [1.0, 200.0]],
        [[1.0, NAN], [1.0, NAN], [NAN, NAN], [0.0, 5.0]],
        [[1.0, 2.0]] * 4,
    ]
)


def weights(values: np.ndarray, *each: float) -> np.ndarray:
    return np.broadcast_to(np.array(each), values.shape)


def test_what_does_not_apply_neither_raises_nor_lowers() -> None:
    parts = EXAMPLE * [1.0, 2.0]  # TRL adds 0 for None: -.387, -1.162, 1.162, .387, and the second is below the first
    assert completed(parts)[0].tolist() == [[0.0, 2.0], [1.0, 2.0], [2.0, 2.0], [3.0, 2.0]]
    found = group_advantages(completed(parts).sum(axis=2), "none")
    assert found[0].tolist() == [-1.5, -0.5, 0.5, 1.5]


def test_a_part_that_some_have_counts_against_the_mean_of_those_alone() -> None:
    parts = np.array([[[1.0, 4.0], [1.0, 0.0], [0.0, NAN]]])
    found = group_advantages(completed(parts).sum(axis=2), "none")
    # by the first reward 1/3, 1/3, -2/3; by the second 2, -2, 0
    np.testing.assert_allclose(found, [[7 / 3, -5 / 3, -2 / 3]], rtol=1e-12)


@pytest.mark.parametrize("scale", ["group", "batch", "none", "leave_one_out"])
def test_rollouts_that_nothing_applies_to_are_in_no_statistic(scale: Scale) -> None:
    rewards, scored = np.array([[0.0, 7.0, 1.0, 7.0], [3.0, 7.0, 2.0, 7.0]]), np.array([[True, False] * 2] * 2)
    found = group_advantages(rewards, scale, scored)
    np.testing.assert_array_equal(found[:, 1::2], 0.0)
    np.testing.assert_allclose(found[:, ::2], group_advantages(rewards[:, ::2], scale), rtol=1e-12)


@pytest.mark.parametrize("scale", ["group", "batch", "none", "leave_one_out"])
def test_a_rollout_that_alone_is_scored_has_nothing_to_compare_with(scale: Scale) -> None:
    scored = np.array([[True, False], [False, False]])
    assert not group_advantages(np.array([[1.0, 0.0], [0.0, 0.0]]), scale, scored).any()


def test_what_applies_to_none_of_a_group_is_no_signal() -> None:
    parts = np.array([[[0.1, NAN], [0.1, NAN], [0.1, NAN]], [[NAN, NAN]] * 3])
    assert group_advantages(completed(parts).sum(axis=2), "group").tolist() == [[0.0] * 3] * 2


def test_equal_values_are_no_signal_whatever_rounding_makes_of_their_mean() -> None:
    parts = np.array([[[0.1], [0.1], [0.1], [NAN]]])
    assert group_advantages(completed(parts).sum(axis=2), "group").tolist() == [[0.0] * 4]


def test_each_reward_normalised_first_by_hand() -> None:
    values = np.array([[[0.0, 10.0], [2.0, 10.0]], [[0.0, 30.0], [0.0, 10.0]]])
    first, second = math.sqrt(2) + 1e-4, math.sqrt(200) + 1e-4  # the standard deviations of 0, 2 and of 30, 10
    sums = np.array([[-1 / first, 1 / first], [5 / second, -5 / second]])  # the second weighs a half
    expected = sums / (sums.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(normalized_then_summed(values, weights(values, 1.0, 0.5)), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("values", "own", "expected"),
    [
        (EXAMPLE, (1.0, 2.0), [[-1.16178, -0.38726, 0.38726, 1.16178]]),  # TRL
        (
            MANY,
            (1.0, 1.0),
            [[-2.09602, 0.10488, 0.55883, 1.43231], [0.73364, 0.73364, 0.0, -1.46727], [0.0] * 4],  # TRL
        ),
    ],
)
def test_each_reward_normalised_first_is_what_trl_gives(
    values: np.ndarray, own: tuple[float, ...], expected: list[list[float]]
) -> None:
    found = normalized_then_summed(values, weights(values, *own))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert (found[np.isnan(values).all(axis=2)] == 0).all()


def test_normalised_first_a_reward_of_large_numbers_does_not_hide_the_others() -> None:
    values = np.array([[[0.0, 0.0], [1.0, 1000.0], [1.0, 0.0], [0.0, 1000.0]]])
    scaled = values * [1.0, 1e-3]
    np.testing.assert_allclose(
        normalized_then_summed(values, weights(values, 1.0, 1.0)),
        normalized_then_summed(scaled, weights(values, 1.0, 1.0)),
        atol=1e-3,
    )


def test_groups_without_differences_are_exact_zeros() -> None:
    values = np.array([[[0.1, 0.7]] * 3, [[0.0, 0.7], [1.0, 0.7], [1.0, 0.7]]])
    found = normalized_then_summed(values, weights(values, 1.0, 1.0))
    assert found[0].tolist() == [0.0] * 3
    assert (found[1] != 0).all()
    assert normalized_then_summed(values[:1], weights(values[:1], 1.0, 1.0)).tolist() == [[0.0] * 3]


def test_a_group_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="K >= 2"):
        normalized_then_summed(np.zeros((2, 1, 1)), np.ones((2, 1, 1)))
