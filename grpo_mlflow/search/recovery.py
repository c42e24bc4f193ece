"""Trials whose process was interrupted or killed: each waits again as what it is, and the next process goes on with it.

It stays one trial, with its number, its settings, its reports and what sampler and pruner have noted on it. So they
decide as if nothing had happened: a copy would compete with what it was copied from, would be new to asha, and its
number would put it into another bracket of hyperband. (Earlier versions put back a copy, and ended the first as failed:
`study.slots` reads both.)

A waiting trial is taken by one process only, which every storage sees to. That only one puts it back, and not after
another has taken it again, is a right.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from grpo_mlflow import tracking
from grpo_mlflow.errors import UserError
from grpo_mlflow.runs.stored import NotBegun, Stored, find
from grpo_mlflow.runtime import interrupts, owners
from grpo_mlflow.search import records, rights
from grpo_mlflow.search import study as studies
from grpo_mlflow.search.study import KILLED, OWNER, RUN_ID, SLOT, VARIED, fixed

SLOT_TAG = "optuna.slot"  # of a trial's run
_UNSIGNED = 30.0  # seconds that a running trial may have no owner
_MAX_KILLED = 5  # a trial that ends its process this often (memory, a driver) is given up
Unsigned = dict[tuple[int, datetime | None], float]


@contextmanager
def owned(trial: optuna.Trial) -> Iterator[None]:
    """Show that this process runs the trial, until the block ends."""
    trial.set_user_attr(OWNER, owners.me())
    with owners.showing_life(lambda owner: _renew(trial, owner)):
        yield


def _renew(trial: optuna.Trial, owner: dict[str, Any]) -> None:
    require_own(trial)
    trial.set_user_attr(OWNER, owner)


def is_own(trial: optuna.Trial) -> bool:
    """Return whether this process still runs the trial: after long silence, another may have taken it over."""
    now = records.now(trial)
    return now.state == TrialState.RUNNING and owners.is_me(now.user_attrs.get(OWNER))


def require_own(trial: optuna.Trial) -> None:
    """Raise UserError if another process took this one for dead and has the trial now."""
    if not is_own(trial):
        raise UserError(f"trial {trial.number}: another process has it; this one gave no sign of life for too long")


def put_back(study: optuna.Study, trial: optuna.Trial) -> None:
    """Let a trial of this process, which does not go on, wait in the queue again."""
    if is_own(trial):
        now = records.now(trial)
        if _has_a_copy(study, now):  # other settings were about to take its place
            study.tell(trial, state=TrialState.FAIL)
        else:
            _let_wait(study, now, 0)


def _let_wait(study: optuna.Study, trial: FrozenTrial, deaths: int) -> None:
    storage, number = records.storage_of(study), trial._trial_id
    storage.set_trial_user_attr(number, KILLED, trial.user_attrs.get(KILLED, 0) + deaths)
    storage.set_trial_user_attr(number, OWNER, None)  # first, or who takes it next would look dead until it has signed
    storage.set_trial_state_values(number, TrialState.WAITING)


def run_of(trial: optuna.Trial, uri: str | None, parent: str, warn: Callable[[str], None]) -> Stored | None:
    """Return the run of a trial that was put back, and the checkpoint that it goes on from; None: it starts again."""
    if run_id := trial.user_attrs.get(RUN_ID):
        if not tracking.lives(tracking.connect(uri), run_id):
            warn(f"trial {trial.number}: its run {run_id} was deleted in MLflow; it starts again")
            return None
        return _found(trial, run_id, uri, warn)
    if KILLED not in trial.user_attrs:
        return None
    # Its process may have died when the run was open, but the study did not know of it yet.
    opened = tracking.child(tracking.connect(uri), parent, SLOT_TAG, str(trial.user_attrs[SLOT]))
    return _found(trial, opened, uri, warn) if opened else None


def _found(trial: optuna.Trial, run_id: str, uri: str | None, warn: Callable[[str], None]) -> Stored | None:
    tracking.require_free(uri, run_id)
    try:
        found = find(run_id, uri)
    except NotBegun:  # it had not got as far as to its config
        return Stored(run_id, {}, None)
    why = f"no checkpoint of its run {run_id} is whole" if found.damaged else None
    if found.checkpoint is None and not why and (where := tracking.elsewhere(uri, run_id)) is not None:
        why = f"its run {run_id} has its files in {where}"
    if why:  # in the same run it would log every iteration again
        warn(f"trial {trial.number}: {why}; it starts again, in a new run")
        return None
    return found


def drawn(trial: optuna.Trial) -> list[str]:
    """Return the settings that a trial drew before it was put back. A copy's are those that the queue prescribes."""
    return list(trial.user_attrs.get(VARIED, fixed(records.now(trial))))


def complete(study: optuna.Study, trial: optuna.Trial) -> None:
    """Note in a copy also those settings of what it was copied from that the space holds no more.

    Its run goes on with them, so it is no trial of today's values.
    """
    if VARIED in trial.user_attrs:  # no copy, or one that is complete
        return
    now = records.now(trial)
    for other in studies.slots(study)[trial.user_attrs[SLOT]]:
        for key in fixed(now).keys() & other.distributions.keys() - now.params.keys():
            records.note(trial, key, fixed(now)[key], other.distributions[key])


def revive(study: optuna.Study, unsigned: Unsigned) -> list[str]:
    """Put back the trials whose process is gone; return a line on each.

    `unsigned` remembers between calls since when a trial has been seen without an owner: its process may be about to
    sign it, or have died before it could.
    """
    if not _dead(study, unsigned):
        return []
    right = rights.take(records.storage_of(study), study.study_name, rights.REVIVER)
    if right is None:
        return []  # another process is at it
    said = []
    with interrupts.deferred(), right.held():
        for trial in _dead(study, unsigned):  # what was dead before may have a living owner by now
            if SLOT not in trial.user_attrs or _has_a_copy(study, trial):
                study.tell(trial.number, state=TrialState.FAIL)
                continue
            killed = trial.user_attrs.get(KILLED, 0) + 1
            if killed >= _MAX_KILLED:
                study.tell(trial.number, state=TrialState.FAIL)
                said.append(f"trial {trial.number}: its process died, for the {killed}th time; it is given up")
                continue
            _let_wait(study, trial, 1)
            said.append(f"trial {trial.number}: its process died; it is put back and goes on from its last checkpoint")
    return said


def _dead(study: optuna.Study, unsigned: Unsigned) -> list[FrozenTrial]:
    """Return the running trials whose process is gone."""
    found = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if owner := trial.user_attrs.get(OWNER):
            if owners.gone(owner):
                found.append(trial)
            continue
        since = unsigned.setdefault((trial.number, trial.datetime_start), time.monotonic())  # each start is another
        if time.monotonic() - since > _UNSIGNED:
            found.append(trial)
    return found


def _has_a_copy(study: optuna.Study, trial: FrozenTrial) -> bool:
    """Return whether a later trial has the place: an earlier version was killed before it had ended what it copied."""
    return any(other.number > trial.number for other in studies.slots(study)[trial.user_attrs[SLOT]])
