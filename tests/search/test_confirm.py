"""The winner's score comes from problems that have not chosen it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from benchmarks import null_studies
from grpo_mlflow.algorithm.statistics import rate_interval
from grpo_mlflow.config import resolve
from grpo_mlflow.errors import ConfigError
from grpo_mlflow.search import report
from grpo_mlflow.search.confirm import Finalist, chosen_and_measured


def trial_of(number: int) -> FrozenTrial:
    trial = create_trial(state=TrialState.COMPLETE, value=0.0)
    trial.number = number
    return trial


def finalist_of(number: int, solved: int, of: int = 64) -> Finalist:
    rates = tuple([1.0] * solved + [0.0] * (of - solved))
    return Finalist(trial_of(number), rate_interval(rates, 1), rates, 1)


def test_finalists_are_ranked_on_one_set_and_the_first_two_reported_from_another() -> None:
    solved = {0: (30, 20), 1: (50, 10), 2: (40, 30)}
    asked: list[tuple[int, int]] = []

    def measure(trial: FrozenTrial, block: int) -> Finalist:
        asked.append((trial.number, block))
        return finalist_of(trial.number, solved[trial.number][block])

    found, own = chosen_and_measured([trial_of(number) for number in solved], measure)
    assert own is None
    assert [each.trial.number for each in found] == [1, 2, 0]  # what comes of the second set does not choose again
    assert [each.confirmed.value * 64 for each in found] == [10, 30, 30]
    assert asked == [(0, 0), (1, 0), (2, 0), (1, 1), (2, 1)]


@pytest.mark.parametrize(
    ("solved", "listed", "reported"),
    [
        ({0: (60, 20), 1: (50, 30), 2: (40, 30)}, [0, 1, 2], [20, 30, 40]),  # they lead, whatever comes after
        ({0: (45, 60), 1: (50, 30), 2: (40, 30)}, [1, 2], [30, 30]),
        ({0: (20, 60), 1: (50, 30)}, [1], [30]),
        ({0: (50, 60), 1: (50, 30)}, [1], [30]),  # no better than the winner
    ],
    ids=["best", "between", "last", "equal"],
)
def test_own_settings_win_by_the_problems_that_rank(
    solved: dict[int, tuple[int, int]], listed: list[int], reported: list[int]
) -> None:
    def measure(trial: FrozenTrial, block: int) -> Finalist:
        return finalist_of(trial.number, solved[trial.number][block])

    found, own = chosen_and_measured([trial_of(number) for number in solved if number], measure, trial_of(0))
    assert [each.trial.number for each in found] == listed
    assert [each.confirmed.value * 64 for each in found] == reported
    assert own is not None
    assert own.confirmed.value * 64 == solved[0][1]
    if 0 in listed:
        assert own == found[0]


@pytest.mark.parametrize("own", [None, 4])
def test_one_that_is_compared_with_none_is_measured_once(own: int | None) -> None:
    asked: list[int] = []

    def measure(trial: FrozenTrial, block: int) -> Finalist:
        asked.append(block)
        return finalist_of(trial.number, 8)

    found, beside = chosen_and_measured([trial_of(4)], measure, None if own is None else trial_of(own))
    assert len(found) == 1
    assert beside == (None if own is None else found[0])
    assert asked == [0]
    assert chosen_and_measured([], measure, trial_of(4)) == ([], None)


def test_a_loss_is_said_to_be_a_loss_and_own_settings_can_win() -> None:
    winner, second, own = finalist_of(3, 20), finalist_of(5, 50), finalist_of(0, 20)
    text = report.summary(1, [], 0, [winner, second], own)
    assert "against the second -0.469 [" in text
    assert text.endswith("]: worse, beyond the noise of problems")
    assert "against your own settings +0.000 [" in text
    assert "]: not distinguishable, within the noise of problems;" in text
    wins = report.summary(1, [], 0, [second, winner], second)
    assert "verdict   your own settings win; against the second +0.469 [" in wins
    assert wins.endswith("]: better, beyond the noise of problems")
    assert "yours" not in wins


def test_problems_that_chose_the_winner_prove_nothing() -> None:
    """A small task has no fresh ones."""
    winner, second = (replace(finalist_of(number, solved), fresh=False) for number, solved in ((1, 60), (2, 20)))
    text = report.summary(1, [], 0, [winner, second], second)
    assert text.count("on 64 problems that chose the winner, as the task has no fresh ones: optimistic") == 3
    assert "fresh problems" not in text
    assert text.endswith("against the second +0.625 on the problems that chose the winner, which is no evidence")
    assert "noise" not in text


@pytest.mark.parametrize("finalists", [1, 3, 10])
def test_equal_models_are_not_told_apart(finalists: int) -> None:
    """Neither the winner nor the own settings, which may win, are measured where they were chosen."""
    row = null_studies.simulate(finalists, 400, seed=1)
    # 400 studies at .025 have 10; 19 or more in 0.6% of such simulations
    assert row.own <= 18 / 400
    assert row.second <= 18 / 400
    assert row.coverage >= 0.93
    assert abs(row.bias) < 0.012  # four standard errors: .05 / 20
    assert row.held >= 0.93
    assert abs(row.advantage) < 0.008  # four standard errors: .036 / 20


def test_choosing_and_reporting_on_one_set_would_be_optimistic() -> None:
    row = null_studies.simulate(10, 300, seed=1, sets=1)
    assert row.own > 0.06
    assert row.bias > 0.02
    assert row.advantage > 0.02


def test_both_sets_of_fresh_problems_are_apart_from_training_and_evaluation() -> None:
    words = ["search.confirm_seed_start=4000", "search.confirm_num_ids=600"]
    with pytest.raises(ConfigError, match=r"search\.confirm_seed_start = 4000: .* overlap evaluation seeds 5000"):
        resolve("tiny", [*words, "search.finalists=2"])
    with pytest.raises(ConfigError, match=r"overlap evaluation seeds 5000"):  # where the own settings may win
        resolve("tiny", [*words, "search.finalists=1"])
    resolve("tiny", [*words, "search.finalists=0"])
