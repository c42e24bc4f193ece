"""A study as a queue: every trial has a place in it, and keeps it until it ends.

Interrupted and killed trials go on in the MLflow run that they have, from its last checkpoint (recovery.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import check_distribution_compatibility
from optuna.exceptions import DuplicatedStudyError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from grpo_mlflow.algorithm.statistics import mean, rate_interval
from grpo_mlflow.config import TRAITS, Config
from grpo_mlflow.errors import UserError
from grpo_mlflow.runtime.pace import duration
from grpo_mlflow.search import choices, records, rights, settings
from grpo_mlflow.search.paired import rates_key
from grpo_mlflow.search.space import Space

# User attributes of a trial.
SLOT = "slot"  # its place in the queue
OWN = "own_settings"  # the queue prescribes the config's own settings
RUN_ID, OWNER = "run_id", "owner"
KILLED = "killed"  # how often its process died; only trials that were put back have it
SETTLED = "settled"  # its settings are all drawn
TOKENS, SECONDS = "tokens", "seconds"  # what it has cost so far
SCORE = "score_so_far"  # by the objective of the study
DUPLICATE_OF = "duplicate_of"
VARIED = "varied"  # the settings that it drew; a later space may hold others, too
SETTINGS = "settings"  # what equal settings have in common
DRAWN = "drawn_again"  # how often other settings were drawn in its place
_AHEAD = 16  # trials that wait at once
_CONFIG, _GRID = "config", "grid"
_SIGNING = 3.0  # seconds in which who created a study notes its settings, unless its process has died


def open_study(storage: BaseStorage, config: Config, space: Space) -> optuna.Study:
    """Create the study, or load it to continue it.

    Raises:
        UserError: it was begun with other settings, so that its trials would not be comparable; or the sampler lacks a
            package.
    """
    choices.require(config, space)
    name, directions = config.search.study_name, choices.directions(config)
    try:
        study = optuna.create_study(study_name=name, storage=storage, directions=directions)
        _sign(study, config, space)
    except DuplicatedStudyError:
        study = optuna.load_study(study_name=name, storage=storage)
        until = time.monotonic() + _SIGNING
        while _CONFIG not in records.kept(study) and time.monotonic() < until:
            time.sleep(0.1)
        if _CONFIG not in records.kept(study):
            _sign(study, config, space)
        _require_same(study, config, space, len(directions))
    study.pruner = choices.pruner(config)  # each trial has a sampler of its own
    return study


def _sign(study: optuna.Study, config: Config, space: Space) -> None:
    records.keep(study, _GRID, _grid(config, space))
    records.keep(study, _CONFIG, settings.comparable(config))  # the last: whoever sees it sees all


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
    kept = records.kept(study)
    if kept.get(_GRID) != _grid(config, space):
        raise UserError(f"search.space: study {study.study_name!r} was begun with another grid or sampler; {advice}")
    varies = {dimension.key for dimension in space.dimensions}
    begun, followed = settings.pinned_then(kept.get(_CONFIG, {}))
    _require_alike_evaluated(study, varies, followed)
    for key, value in settings.pinned_then(settings.comparable(config))[0].items():
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


def _require_alike_evaluated(study: optuna.Study, varies: Collection[str], followed: Mapping[str, str]) -> None:
    """Raise UserError if an earlier version has evaluated each trial with its own value of something that differs.

    `varies` now, or has varied in trials: then these cannot be compared, whether the space still holds it or not.
    """
    drawn = {key for trial in study.get_trials(deepcopy=False) for key in trial.distributions}
    for key in sorted({*varies, *drawn}):
        traits = TRAITS.get(key)
        if key in followed or (traits is not None and traits.evaluation and not traits.varies):
            share = f", whose trials share {followed[key]}" if key in followed else ""
            raise UserError(
                f"search.space: {key}: study {study.study_name!r} was begun by a version that evaluated each trial "
                f"with its own; allowed: another search.study_name{share}"
            )


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
                    marks = {SLOT: slot, OWN: bool(self._own) and fixed == self._own}
                    self._study.enqueue_trial(fixed, user_attrs=marks)
        return True


def slots(study: optuna.Study) -> dict[int, list[FrozenTrial]]:
    """Return the trials of each place in the queue: one, or several where an earlier version retried it."""
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
    kept = records.kept_of(records.now(trial) if isinstance(trial, optuna.Trial) else trial)
    prefix = rates_key(0)[:-1]
    steps = [int(key.removeprefix(prefix)) for key in kept if key.startswith(prefix)]
    return {step: kept[rates_key(step)] for step in sorted(steps)}


def fixed(trial: FrozenTrial) -> dict[str, Any]:
    """Return the settings that the queue prescribes."""
    found: dict[str, Any] = trial.system_attrs.get("fixed_params", {})  # of `Study.enqueue_trial`
    return found


def draw_again(study: optuna.Study, trial: optuna.Trial, fixed: Mapping[str, Any]) -> None:
    """Give the place of a trial, which is about to end, to another one with other settings."""
    marks = {SLOT: trial.user_attrs[SLOT], OWN: False, DRAWN: trial.user_attrs.get(DRAWN, 0) + 1}
    study.enqueue_trial(dict(fixed), user_attrs=marks)


def progress(study: optuna.Study, total: int, started: float, config: Config) -> str:
    """Return a line on where the study of `total` trials stands; `started` (monotonic) is when this process began."""
    search = config.search
    trials = final_trials(study)
    ended = [trial for trial in trials if trial.state.is_finished()]
    text = f"study: {len(ended)} of {total} trials, {sum(t.state == TrialState.PRUNED for t in ended)} pruned"
    if failed := sum(trial.state == TrialState.FAIL for trial in ended):
        text += f", {failed} failed"
    best = next(iter(ranked(ended)), None)
    if best is not None:
        rates, replicates = list(curve(best).values()), config.eval.replicates
        chosen = judged(rates, search.objective, search.objective_window) if rates else []
        interval = rate_interval(chosen, replicates) if chosen else f"{score(best):.3f}"
        text += f", best so far {interval} (trial {best.number})"
    since = time.time() - (time.monotonic() - started)
    mine = [trial for trial in ended if trial.datetime_complete and trial.datetime_complete.timestamp() >= since]
    if mine and len(ended) < total:
        seconds = (time.monotonic() - started) / len(mine) * (total - len(ended))
        text += f", about {duration(seconds)} left"
    return text


def judged(rates: Sequence[Sequence[float]], objective: str, window: int) -> list[float]:
    """Return pass@k of each problem that a trial is judged by, from those at all of its evaluations.

    Those of the last evaluation, of the best (the first of equals), or the mean of the last `window`.
    """
    if objective == "best":
        best: Sequence[float] = max(rates, key=mean)
        return list(best)
    if objective == "last":
        return list(rates[-1])
    alike = [each for each in rates[-window:] if len(each) == len(rates[-1])]  # an earlier version has counted repeats
    return [mean(each) for each in zip(*alike, strict=True)]
