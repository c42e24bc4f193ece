"""The figures of a report: each point stands where its trial's value is."""

from __future__ import annotations

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState

from grpo_mlflow.search import figures
from grpo_mlflow.search import study as studies


def test_a_value_that_only_pruned_trials_have_is_drawn_at_its_own_place() -> None:
    """Of [null, 0.5, 1.0] the pruned trial has a number, and the others do not all: one axis of words holds them."""
    kind = CategoricalDistribution((None, 0.5, 1.0))
    study = optuna.create_study(direction="maximize")
    for value, state, score in ((None, "COMPLETE", 0.1), (0.5, "COMPLETE", 0.2), (1.0, "PRUNED", 0.3)):
        study.add_trial(
            optuna.trial.create_trial(
                params={"train.grad_clip": value},
                distributions={"train.grad_clip": kind},
                state=TrialState[state],
                value=score if state == "COMPLETE" else None,
                user_attrs={studies.SCORE: score},
            )
        )
    drawn = dict(figures.all_figures(study, study.trials, [], 1))["Score against each setting."]
    (axes,) = drawn.axes
    words = [label.get_text() for label in axes.get_xticklabels()]
    points = {(words[int(x)], y) for group in axes.collections for x, y in np.asarray(group.get_offsets())}
    assert points == {("None", 0.1), ("0.5", 0.2), ("1.0", 0.3)}
