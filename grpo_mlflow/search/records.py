"""What the program keeps in a study for itself: its comparable settings, the success rates of every problem.

They are system attributes of the study and its trials. User attributes would be printed in full, thousands of
characters a line, by `optuna studies`, `optuna trials` and the dashboard. Earlier versions kept them there; such
studies are read, and go on.
"""

from __future__ import annotations

from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

_PREFIX = "grpo:"  # samplers and pruners have system attributes of their own


def storage_of(study: optuna.Study) -> BaseStorage:
    """Return where a study is kept: system attributes, and states that go back, are set there and nowhere else."""
    return study._storage


def keep(study: optuna.Study, key: str, value: Any) -> None:
    """Keep a value that JSON can hold in a study."""
    storage_of(study).set_study_system_attr(study._study_id, _PREFIX + key, value)


def kept(study: optuna.Study) -> dict[str, Any]:
    """Return all that is kept in a study, by key."""
    found = storage_of(study).get_study_system_attrs(study._study_id)
    own = {key.removeprefix(_PREFIX): value for key, value in found.items() if key.startswith(_PREFIX)}
    return study.user_attrs | own


def keep_of(trial: optuna.Trial, key: str, value: Any) -> None:
    """Keep a value that JSON can hold in a trial that has not ended."""
    trial.storage.set_trial_system_attr(trial._trial_id, _PREFIX + key, value)


def kept_of(trial: FrozenTrial) -> dict[str, Any]:
    """Return all that is kept in a trial, by key."""
    found = {k.removeprefix(_PREFIX): value for k, value in trial.system_attrs.items() if k.startswith(_PREFIX)}
    return trial.user_attrs | found


def kept_at(trial: FrozenTrial, key: str) -> Any:
    """Return what is kept in a trial under a key, or None."""
    return trial.system_attrs.get(_PREFIX + key, trial.user_attrs.get(key))


def note(trial: optuna.Trial, key: str, value: Any, distribution: BaseDistribution) -> None:
    """Note a setting that a trial has, and that no space of today can suggest."""
    trial.storage.set_trial_param(trial._trial_id, key, distribution.to_internal_repr(value), distribution)


def report(trial: optuna.Trial, step: int, value: float) -> None:
    """Report a value to the study. `Trial.report` would leave what was reported before at that step."""
    trial.storage.set_trial_intermediate_value(trial._trial_id, step, value)


def now(trial: optuna.Trial) -> FrozenTrial:
    """Return a trial as it stands in the storage, where other processes may have changed it."""
    return trial.storage.get_trial(trial._trial_id)
