"""What a run tells of itself: each thing where it is true, once, and nothing of a healthy run."""

from __future__ import annotations

import math

import pytest

from grpo_mlflow.algorithm.statistics import paired_difference
from grpo_mlflow.training.observations import Watch, of_evaluation, of_iteration

HEALTHY: dict[str, float | None] = {
    **{"loss_total": 0.01, "flat_group_frac": 0.5, "success_rate": 0.4, "kl_divergence": 0.2},
    **{"truncated_frac": 0.1, "sampler_ratio_mean": 0.96, "entropy_mean": 0.3},
}


def _told(*iterations: dict[str, float | None]) -> dict[str, int]:
    """Return the iteration in which each kind is told first."""
    found: dict[str, int] = {}
    watch = Watch()
    for number, changed in enumerate(iterations):
        after = watch.after_iteration(of_iteration(HEALTHY | changed), number)
        found |= {kind: number for kind in after.told if kind not in watch.told}
        assert len(after.news(watch)) == len(after.told) - len(watch.told)
        watch = after
    return found


def test_a_healthy_run_is_told_nothing_of() -> None:
    assert of_iteration(HEALTHY) == []
    assert of_iteration(dict.fromkeys(HEALTHY)) == of_iteration({}) == []


@pytest.mark.parametrize(
    ("changed", "kind", "words"),
    [
        ({"loss_total": math.nan, "grad_norm": math.inf}, "not_finite", "train/loss_total, train/grad_norm"),
        ({"kl_divergence": 5.65}, "kl", "5.65 per token"),
        ({"truncated_frac": 0.75}, "truncated", "75% of the completions"),
        ({"sampler_ratio_mean": 1.18}, "sampler_ratio", "1.18 times as likely"),
        ({"sampler_ratio_mean": 0.3}, "sampler_ratio", "0.30 times as likely"),
        ({"flat_group_frac": 1.0, "success_rate": 0.0}, "flat", "take easier problems"),
        ({"flat_group_frac": 1.0, "success_rate": 1.0}, "flat", "take harder ones"),
        ({"flat_group_frac": 1.0}, "flat", "generation.temperature"),
        ({"flat_group_frac_trained": 1.0}, "flat", "nothing is learned"),
    ],
)
def test_each_thing_is_seen_and_named_with_a_remedy(changed: dict[str, float | None], kind: str, words: str) -> None:
    (seen,) = of_iteration(HEALTHY | changed)
    assert seen.kind == kind
    assert words in seen.text
    assert "\n" not in seen.text


@pytest.mark.parametrize(
    "changed",
    [
        {"truncated_frac": 0.5},
        {"kl_divergence": 1.0},
        {"sampler_ratio_mean": 1.1},
        {"sampler_ratio_mean": 0.5},
        {"flat_group_frac": 0.99},
        {"flat_group_frac": 1.0, "flat_group_frac_trained": 0.5},  # sampled anew, so something was trained on
    ],
)
def test_what_stands_at_its_limit_is_not_told(changed: dict[str, float | None]) -> None:
    assert of_iteration(HEALTHY | changed) == []


def test_the_ratio_to_another_policys_rollouts_shows_nothing() -> None:
    off: dict[str, float | None] = {"sampler_ratio_mean": 3.0}
    assert [each.kind for each in of_iteration(off)] == ["sampler_ratio"]
    assert of_iteration(off, own_rollouts=False) == []


def test_what_may_be_chance_once_is_told_when_it_lasts() -> None:
    flat: dict[str, float | None] = {"flat_group_frac": 1.0}
    off: dict[str, float | None] = {"sampler_ratio_mean": 1.3}
    assert _told(flat, flat, {}, flat, flat, flat, flat) == {"flat": 5}
    assert _told(off, {}, off, off) == {"sampler_ratio": 3}
    assert _told({"kl_divergence": 2.0}) == {"kl": 0}


def test_a_thing_is_told_once_with_its_first_iteration() -> None:
    long: dict[str, float | None] = {"truncated_frac": 0.9}
    assert _told({}, long, {}, long) == {"truncated": 1}
    watch = Watch().after_iteration(of_iteration(HEALTHY | long), 1)
    (text,) = watch.told.values()
    assert text.startswith("iteration 1: 90% ")
    again = watch.after_iteration(of_iteration(HEALTHY | {"truncated_frac": 0.6}), 2)
    assert (again.told, again.news(watch)) == (watch.told, [])


def test_worse_is_worse_than_chance() -> None:
    before = [0.5] * 64
    lower = [0.5] * 32 + [0.0] * 32
    assert [each.kind for each in of_evaluation(before, lower, at_the_end=False)] == ["worse"]
    (seen,) = of_evaluation(before, lower, at_the_end=True)
    change = paired_difference(lower, before)
    assert seen.text.startswith(f"pass@1 is 0.250 [{-change.high:.3f}, {-change.low:.3f}] below")
    # 10 of 64 lower: beyond the interval, but not beyond one and a half
    little = [0.5] * 54 + [0.0] * 10
    assert of_evaluation(before, little, at_the_end=False) == []
    assert of_evaluation(before, little, at_the_end=True) != []
    assert of_evaluation(lower, before, at_the_end=True) == []
    assert of_evaluation(before, before, at_the_end=True) == []


def test_all_problems_lost_is_worse_without_any_spread_unless_there_are_too_few() -> None:
    assert len(of_evaluation([1.0] * 12, [0.0] * 12, at_the_end=False)) == 1
    assert of_evaluation([1.0] * 5, [0.0] * 5, at_the_end=True) == []  # a fair coin falls five times alike in 1 of 16


def test_an_evaluation_leaves_the_streaks_of_iterations() -> None:
    flat = HEALTHY | {"flat_group_frac": 1.0}
    watch = Watch().after_iteration(of_iteration(flat), 0).after_evaluation([], 1)
    watch = watch.after_iteration(of_iteration(flat), 1).after_iteration(of_iteration(flat), 2)
    assert list(watch.told) == ["flat"]
