"""What a report is given of Optuna's trials."""

from __future__ import annotations

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from grpo_mlflow.reports.records import Setting
from grpo_mlflow.search import study as studies
from grpo_mlflow.search import trial_records


@pytest.mark.parametrize(
    ("distribution", "value", "setting"),
    [
        (FloatDistribution(1e-5, 1e-3, log=True), 1e-4, Setting("key", "log")),
        (FloatDistribution(0.0, 1.0), 0.5, Setting("key", "linear")),
        (IntDistribution(1, 64, log=True), 8, Setting("key", "log", whole=True)),
        (CategoricalDistribution((1, 2)), 1, Setting("key", "words")),
        (CategoricalDistribution((None, 0.5, 1.0)), 0.5, Setting("key", "words")),
        (CategoricalDistribution((True, False)), True, Setting("key", "words")),
        (CategoricalDistribution(("grpo", "dapo")), "grpo", Setting("key", "words")),
    ],
)
def test_the_scale_of_a_setting_is_that_of_all_it_may_be(
    distribution: BaseDistribution, value: object, setting: Setting
) -> None:
    trial = optuna.trial.create_trial(params={"key": value}, distributions={"key": distribution}, value=0.5)
    without = optuna.trial.create_trial(value=0.5)
    assert trial_records.settings_of([without, trial]) == [setting]


def test_a_trial_is_shown_with_its_score_or_where_it_was_pruned() -> None:
    marks = {studies.SCORE: 0.3, studies.TOKENS: 7, "rates:4": [0.0, 0.5], "rates:8": [0.5, 1.0]}
    states = {TrialState.PRUNED: None, TrialState.COMPLETE: 0.6, TrialState.FAIL: None, TrialState.RUNNING: None}
    trials = [optuna.trial.create_trial(state=state, value=value, user_attrs=marks) for state, value in states.items()]
    found = trial_records.trials_of(trials)
    assert [(trial.pruned, trial.score) for trial in found] == [(True, 0.3), (False, 0.6)]
    assert found[0].curve == [(4, 0.25), (8, 0.75)]
    assert (found[0].tokens, found[0].seconds) == (7, None)
