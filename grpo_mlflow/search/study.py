"""A study as a queue: every trial has a place in it, and a trial that did not end goes back to its place.

Interrupted and killed trials are put back with the id of their MLflow run and what they have reported, and go on in
that run from their last checkpoint.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import check_distribution_compatibility
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from grpo_mlflow.algorithm.statistics import mean, rate_interval
from grpo_mlflow.config import TRAITS, Config, flatten
from grpo_mlflow.errors import UserError
from grpo_mlflow.runtime import interrupts
from grpo_mlflow.search import choices, owners, rights
from grpo_mlflow.search.paired import rates_key
from grpo_mlflow.search.space import Space

# User attributes of a trial.
SLOT = "slot"  # its place in the queue; a trial that is put back keeps it
FIXED = "fixed"  # the settings that the queue prescribes
OWN = "own_settings"  # those are the config's own
RUN_ID, OWNER = "run_id", "owner"
KILLED = "killed"  # how often its process died; only trials that were put back have it
SETTLED = "settled"  # its settings are all drawn
TOKENS, SECONDS = "tokens", "seconds"  # what it has cost so far
DUPLICATE_OF = "duplicate_of"
_OF_ONE_PROCESS = (OWNER, SETTLED, DUPLICATE_OF)
_UNSIGNED = 30.0  # seconds that a running trial may have no owner
_AHEAD = 16  # trials that wait at once
_MAX_KILLED = 5  # a trial that ends its process this often (memory, a driver) is given up
_CONFIG, _GRID = "config", "grid"
_SIGNING = 3.0  # seconds in which who created a study notes its settings, unless its process has died


def open_study(storage: BaseStorage, config: Config, space: Space) -> optuna.Study:
    """Create the study, or load it to continue it.

    Raises:
        UserError: it was begun with other settings, so that its trials would not be comparable.
    """
    name = config.search.study_name
    directions = [StudyDirection.MAXIMIZE]  # pass@k, and for two objectives the cost
    if config.search.sampler == "nsga2":
        directions.append(StudyDirection.MINIMIZE)
    try:
        study = optuna.create_study(study_name=name, storage=storage, directions=directions)
        _sign(study, config, space)
    except DuplicatedStudyError:
        study = optuna.load_study(study_name=name, storage=storage)
        until = time.monotonic() + _SIGNING
        while _CONFIG not in study.user_attrs and time.monotonic() < until:
            time.sleep(0.1)
        if _CONFIG not in study.user_attrs:
            _sign(study, config, space)
        _require_same(study, config, space, len(directions))
    study.sampler, study.pruner = choices.sampler(config, len(study.get_trials(deepcopy=False))), choices.pruner(config)
    return study


def _sign(study: optuna.Study, config: Config, space: Space) -> None:
    study.set_user_attr(_GRID, _grid(config, space))
    study.set_user_attr(_CONFIG, _comparable(config))  # the last: whoever sees it sees all


def _comparable(config: Config) -> dict[str, str]:
    """Return what must be the same for trials to be comparable, as text."""
    flat = flatten(config.model_dump(mode="json"))
    return {key: json.dumps(value) for key, value in flat.items() if TRAITS[key].compared}


def _grid(config: Config, space: Space) -> str | None:
    """Return the grid as text, if there is one: places in the queue stand for its combinations in order."""
    return json.dumps(space.grid()) if config.search.sampler == "grid" else None


def _require_same(study: optuna.Study, config: Config, space: Space, objectives: int) -> None:
    advice = "allowed: the same, or another search.study_name"
    if len(study.directions) != objectives:
        raise UserError(
            f"search.sampler = {config.search.sampler!r}: study {study.study_name!r} was begun with "
            f"{len(study.directions)} objective(s), this has {objectives}; {advice}"
        )
    if study.user_attrs.get(_GRID) != _grid(config, space):
        raise UserError(f"search.space: study {study.study_name!r} was begun with another grid or sampler; {advice}")
    varies = {dimension.key for dimension in space.dimensions}
    begun = study.user_attrs.get(_CONFIG, {})
    for key, value in _comparable(config).items():
        if key not in varies and begun.get(key, value) != value:
            raise UserError(f"{key} = {value}: study {study.study_name!r} was begun with {begun[key]}; {advice}")
    for dimension in space.dimensions:
        for trial in study.get_trials(deepcopy=False):
            if (known := trial.distributions.get(dimension.key)) is not None:
                try:
                    check_distribution_compatibility(known, dimension.distribution)
                except ValueError:
                    raise UserError(
                        f"search.space: {dimension.key}: study {study.study_name!r} was begun with {known}; {advice}"
                    ) from None
                break


class Queue:
    """The places of a study's trials, of which a few at a time wait in the storage: each look at it reads them all."""

    def __init__(self, study: optuna.Study, storage: BaseStorage, config: Config, space: Space) -> None:
        self._study, self._storage = study, storage
        self._wanted, self._own = choices.queue(config, space), space.own(config)

    def __len__(self) -> int:
        return len(self._wanted)

    def fill(self) -> bool:
        """Return whether a trial waits, after queueing some if there are places left."""
        while not self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            first = len(slots(self._study))
            if first >= len(self):
                return False
            right = rights.take(self._storage, self._study.study_name, rights.QUEUER)
            if right is None:  # another process is at it
                time.sleep(0.1)
                continue
            with right.held():
                first = len(slots(self._study))
                for slot in range(first, min(first + _AHEAD, len(self))):
                    fixed = self._wanted[slot]
                    marks = {SLOT: slot, FIXED: fixed, OWN: bool(self._own) and fixed == self._own}
                    self._study.enqueue_trial(fixed, user_attrs=marks)
        return True


def slots(study: optuna.Study) -> dict[int, list[FrozenTrial]]:
    """Return the trials of each place in the queue: one, or several where it was interrupted or killed and retried."""
    found: dict[int, list[FrozenTrial]] = {}
    for trial in study.get_trials(deepcopy=False):
        if SLOT in trial.user_attrs:
            found.setdefault(trial.user_attrs[SLOT], []).append(trial)
    return found


def final_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Return the last trial of each place that was begun or waits."""
    return [max(trials, key=lambda trial: trial.number) for _, trials in sorted(slots(study).items())]


def begun_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Return those of the final trials that do not wait."""
    return [trial for trial in final_trials(study) if trial.state != TrialState.WAITING]


def ranked(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials that finished, best first."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    return sorted(complete, key=lambda trial: (-score(trial), trial.number))


def score(trial: FrozenTrial) -> float:
    """Return the first objective of a finished trial."""
    assert trial.values is not None
    return float(trial.values[0])


def curve(trial: FrozenTrial | optuna.Trial) -> dict[int, list[float]]:
    """Return pass@k of each problem at every evaluation that the trial reported."""
    attributes, prefix = trial.user_attrs, rates_key(0)[:-1]
    steps = [int(key.removeprefix(prefix)) for key in attributes if key.startswith(prefix)]
    return {step: attributes[rates_key(step)] for step in sorted(steps)}


def put_back(study: optuna.Study, trial: FrozenTrial | optuna.Trial, **changes: Any) -> None:
    """Put an ended trial back into the queue, with its settings, its run and what it has reported."""
    attributes = {KILLED: 0} | {key: value for key, value in trial.user_attrs.items() if key not in _OF_ONE_PROCESS}
    study.enqueue_trial({**trial.user_attrs.get(FIXED, {}), **trial.params}, user_attrs={**attributes, **changes})


def revive(study: optuna.Study, unsigned: dict[int, float]) -> list[str]:
    """Put back the trials whose process is gone; return a line on each.

    `unsigned` remembers between calls since when a trial has been seen without an owner: its process may be about to
    sign it, or have died before it could.
    """
    said = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        owner = trial.user_attrs.get(OWNER)
        since = unsigned.setdefault(trial.number, time.monotonic())
        if not (owners.gone(owner) if owner else time.monotonic() - since > _UNSIGNED):
            continue
        with interrupts.deferred():
            try:
                study.tell(trial.number, state=TrialState.FAIL)
            except (ValueError, UpdateFinishedTrialError):
                continue  # another process was faster
            if SLOT not in trial.user_attrs or _put_back_already(study, trial):
                continue
            killed = trial.user_attrs.get(KILLED, 0) + 1
            if killed >= _MAX_KILLED:
                said.append(f"trial {trial.number}: its process died, for the {killed}th time; it is given up")
                continue
            put_back(study, trial, **{KILLED: killed})
            said.append(f"trial {trial.number}: its process died; it is put back and goes on from its last checkpoint")
    return said


def _put_back_already(study: optuna.Study, trial: FrozenTrial) -> bool:
    """Return whether a later trial has the place: its process was killed while it stopped in an orderly way."""
    return any(other.number > trial.number for other in slots(study)[trial.user_attrs[SLOT]])


def progress(study: optuna.Study, total: int, started: float) -> str:
    """Return a line on where the study of `total` trials stands; `started` (monotonic) is when this process began."""
    trials = final_trials(study)
    ended = [trial for trial in trials if trial.state.is_finished()]
    text = f"study: {len(ended)} of {total} trials, {sum(t.state == TrialState.PRUNED for t in ended)} pruned"
    if failed := sum(trial.state == TrialState.FAIL for trial in ended):
        text += f", {failed} failed"
    best = next(iter(ranked(ended)), None)
    if best is not None:
        rates, replicates = curve(best), int(study.user_attrs[_CONFIG]["eval.replicates"])
        interval = rate_interval(rates[max(rates)], replicates) if rates else f"{score(best):.3f}"
        text += f", best so far {interval} (trial {best.number})"
    since = time.time() - (time.monotonic() - started)
    mine = [trial for trial in ended if trial.datetime_complete and trial.datetime_complete.timestamp() >= since]
    if mine and len(ended) < total:
        seconds = (time.monotonic() - started) / len(mine) * (total - len(ended))
        text += f", about {seconds:.0f}s left"
    return text


def objective_value(rates: Sequence[Sequence[float]], objective: str, window: int) -> float:
    """Return a trial's score from pass@k of each problem at its evaluations: the last, the best, or a mean."""
    scores = [mean(each) for each in rates]
    if objective == "best":
        return max(scores)
    return scores[-1] if objective == "last" else mean(scores[-window:])
