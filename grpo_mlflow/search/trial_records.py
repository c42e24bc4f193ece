"""From Optuna's trials to the plain records that a report is made of."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import optuna
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.importance import get_param_importances
from optuna.trial import FrozenTrial, TrialState

from grpo_mlflow.algorithm.statistics import mean
from grpo_mlflow.reports.records import Setting, TrialRecord
from grpo_mlflow.search import study as studies

_FEWEST = 4  # finished trials, below which importances say nothing


def shown_score(trial: FrozenTrial) -> float | None:
    """Return a trial's score; of a pruned one, the one that it had by then."""
    if trial.state == TrialState.COMPLETE:
        return studies.score(trial)
    if studies.SCORE in trial.user_attrs:
        return float(trial.user_attrs[studies.SCORE])
    curve = studies.curve(trial)
    return mean(curve[max(curve)]) if curve else None


def trials_of(trials: Sequence[FrozenTrial]) -> list[TrialRecord]:
    """Return the trials that finished or were pruned, and have a score."""
    found = []
    for trial in trials:
        score = shown_score(trial)
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) and score is not None:
            record = TrialRecord(
                number=trial.number,
                pruned=trial.state == TrialState.PRUNED,
                score=score,
                settings=trial.params,
                curve=[(step, mean(rates)) for step, rates in studies.curve(trial).items()],
                tokens=trial.user_attrs.get(studies.TOKENS),
                seconds=trial.user_attrs.get(studies.SECONDS),
            )
            found.append(record)
    return found


def settings_of(trials: Sequence[FrozenTrial]) -> list[Setting]:
    """Return the settings that the trials vary, by name, each with its scale."""
    return [_setting(trials, key) for key in sorted({key for trial in trials for key in trial.params})]


def _setting(trials: Sequence[FrozenTrial], key: str) -> Setting:
    """Return a setting with the scale that its distribution has; choices, numbers too, are words in their order."""
    distribution = next((t.distributions[key] for t in trials if key in t.distributions), None)
    if isinstance(distribution, (FloatDistribution, IntDistribution)):
        whole = isinstance(distribution, IntDistribution)
        return Setting(key, "log" if distribution.log else "linear", whole)
    return Setting(key, "words")


def importances(study: optuna.Study, trials: Sequence[FrozenTrial]) -> Mapping[str, float]:
    """Return how much each setting decides about a good score; nothing of too few trials, or of equal ones."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if len(complete) < _FEWEST or len({studies.score(trial) for trial in complete}) < 2:
        return {}
    target = (lambda trial: -studies.score(trial)) if len(study.directions) > 1 else None  # it looks for low ones
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # on few trials, which the report says
        return get_param_importances(study, target=target)
