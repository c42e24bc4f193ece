"""A run says how much it will sample before it begins, and how long that takes as soon as it knows."""

from __future__ import annotations

import pytest

from grpo_mlflow import runs
from grpo_mlflow.config import resolve
from grpo_mlflow.training.outlook import Work, expected, planned, planned_evaluation, planned_study, work
from tests.support.small_runs import small

HUB = ["model.train_id=some/model", "generation.backend=local"]


def test_the_default_of_a_hub_model() -> None:
    """16 rollouts in each of 10 iterations; 16 problems, 4 times and greedily, before, after each, 256 tokens all."""
    config = resolve("", HUB).config
    assert work(config, 0) == Work(iterations=10, evaluations=11, rollouts=16, measured=80)
    assert planned(config, work(config, 0)) == (
        "planned: 10 iterations of 16 completions, 11 evaluations of 80; at most 266,240 tokens"
    )


@pytest.mark.parametrize(
    ("begun", "evaluated", "evaluations"),
    [(0, False, 5), (0, True, 4), (1, False, 4), (3, False, 4), (3, True, 3), (9, False, 2), (10, False, 1)],
)
def test_evaluations_that_are_left(begun: int, evaluated: bool, evaluations: int) -> None:
    """With an interval of 3 they are due at 0, 3, 6, 9, and at the end, 10."""
    config = resolve("", [*HUB, "eval.interval=3"]).config
    left = work(config, begun, evaluated=evaluated)
    assert (left.iterations, left.evaluations) == (10 - begun, evaluations)


def test_a_study_and_an_evaluation() -> None:
    config = resolve("", HUB).config
    assert planned_evaluation(config) == "planned: 80 completions of 16 problems; at most 20,480 tokens"
    assert planned_study(config, 12) == (
        "planned: 12 trials, each of 10 iterations of 16 completions, 10 evaluations of 80; at most 245,760 tokens "
        "(a pruned one ends earlier)"
    )


def test_what_samples_nothing_plans_nothing() -> None:
    config = resolve("", [*HUB, "eval.enabled=false", "data.source=runs:/" + 32 * "0"]).config
    assert planned(config, work(config, 0)) == "planned: 10 iterations on rollouts that are kept; at most 0 tokens"
    assert planned(config, work(config, 10)) == ""


def test_the_time_that_is_left() -> None:
    left = Work(9, 10, 16, 80)
    assert expected(left, 80.0, 70.0) == "about 24 min left: 9 iterations of 80s, 10 evaluations of 70s"
    assert expected(Work(9, 0, 16, 80), 80.0, 0.0) == "about 12 min left: 9 iterations of 80s"
    assert expected(left, 1.0, 1.0) == "", "it is over before one has read it"


def test_a_run_says_its_plan_before_its_first_evaluation(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    runs.train(small(store))
    lines = capsys.readouterr().out.splitlines()
    begins = [line.split()[0] for line in lines if line]
    assert begins.index("planned:") < begins.index("eval")
    assert begins.count("planned:") == 1
