"""A study: one parent run, a nested run per trial, and a second, fairer look at the best.

The best of many noisy trials looks better than it is, because being lucky is one way to be the best. So the study ends
by measuring its finalists again on fresh problems with more replicates, and names the winner by that.

Interrupted and killed trials are put back into the queue with the id of their MLflow run, and go on in it from their
last checkpoint. Running the same command again continues the study up to its number of trials.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState

from grpo_mlflow import runs, sources
from grpo_mlflow.config import Config, Resolved, dump, overlay
from grpo_mlflow.console import Console
from grpo_mlflow.errors import Pruned, UserError
from grpo_mlflow.evaluation import Evaluation
from grpo_mlflow.interrupts import Interrupted
from grpo_mlflow.search import choices
from grpo_mlflow.search.paired import rates_key
from grpo_mlflow.search.space import Space
from grpo_mlflow.statistics import Estimate, mean, rate_interval
from grpo_mlflow.tracking import one_line, redact

SLOT = "slot"  # a trial's place in the queue; a trial that is retried keeps it


@dataclass(frozen=True, slots=True)
class Finalist:
    """A trial that was measured again: its score in the search, and on fresh problems."""

    trial: FrozenTrial
    selected: Estimate
    confirmed: Evaluation


def open_storage(url: str | None) -> RDBStorage:
    """Open the storage at `url`, by default optuna.db in the current folder.

    Raises:
        UserError: it cannot be opened.
    """
    url = url or f"sqlite:///{Path('optuna.db').absolute()}"
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # what fails is said below, in one line
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    try:
        return RDBStorage(
            url,
            heartbeat_interval=60,
            grace_period=180,  # shorter ones have failed live trials
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(inherit_intermediate_values=True),
        )
    except Exception as error:  # SQLAlchemy's, a missing driver's, a URL's: all mean the same to the person
        raise UserError(f"search.storage = {redact(url)!r}: {one_line(error)}") from error


def open_study(config: Config, space: Space) -> optuna.Study:
    """Create the study with its queue of trials, or load it; a queue that is too short is made longer."""
    storage, name = open_storage(config.search.storage), config.search.study_name
    wanted = choices.queue(config, space)
    try:
        study = optuna.create_study(study_name=name, storage=storage, direction="maximize")
    except optuna.exceptions.DuplicatedStudyError:
        study = optuna.load_study(study_name=name, storage=storage)
    study.sampler, study.pruner = choices.sampler(config, len(study.trials)), choices.pruner(config)
    for slot in range(len(slots(study)), len(wanted)):
        study.enqueue_trial(wanted[slot], user_attrs={SLOT: slot})
    return study


def slots(study: optuna.Study) -> dict[int, list[FrozenTrial]]:
    """Return the trials of each place in the queue: one, or several where it was interrupted or killed and retried."""
    found: dict[int, list[FrozenTrial]] = {}
    for trial in study.get_trials(deepcopy=False):
        if SLOT in trial.user_attrs:
            found.setdefault(trial.user_attrs[SLOT], []).append(trial)
    return found


def final_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Return the last trial of each place in the queue."""
    return [max(trials, key=lambda trial: trial.number) for _, trials in sorted(slots(study).items())]


class Search:
    """Runs trials of a study under one parent run."""

    def __init__(self, resolved: Resolved, space: Space, study: optuna.Study, parent: str, console: Console) -> None:
        self._resolved, self._space, self._study = resolved, space, study
        self._parent, self._console = parent, console
        self._started = time.monotonic()
        self._stop: Interrupted | None = None

    def run(self) -> None:
        """Run trials while any waits in the queue, or until the time is up. A failed trial does not end the study."""
        while not self.time_is_up and any(t.state == TrialState.WAITING for t in final_trials(self._study)):
            self._study.optimize(self._objective, n_trials=1, catch=(Exception,))
            if self._stop is not None:
                raise self._stop
            self._console.say(progress(self._study, self._started))

    @property
    def time_is_up(self) -> bool:
        limit = self._resolved.config.search.timeout
        return limit is not None and time.monotonic() - self._started > limit

    def confirm(self) -> list[Finalist]:
        """Measure the best trials again on fresh problems and return them, best first by that."""
        search = self._resolved.config.search
        ended = final_trials(self._study)
        complete = [t for t in ended if t.state == TrialState.COMPLETE and "run_id" in t.user_attrs]
        ranked = sorted(complete, key=lambda t: (-(t.value or 0.0), t.number))
        finalists = []
        for trial in ranked[: search.finalists]:
            again = {
                "eval.id_seed_start": search.confirm_seed_start,
                "eval.num_ids": search.confirm_num_ids,
                "eval.replicates": search.confirm_replicates,
                "search.finalists": 0,  # those problems are in use now
            }
            stored = sources.find(trial.user_attrs["run_id"], self._resolved.config.tracking.uri)
            if stored.checkpoint is None:
                raise UserError(f"trial {trial.number}: its run {stored.run_id} has no checkpoint to confirm")
            trial_config = overlay(self._trial_config(trial.params), again, "confirmation")
            result = runs.evaluate(
                trial_config, stored.checkpoint.path, runs.Nested(self._parent, f"confirm-{trial.number}")
            )
            rates = trial.user_attrs[rates_key(max(trial.intermediate_values))]
            finalists.append(Finalist(trial, rate_interval(rates), result))
        return sorted(finalists, key=lambda f: -f.confirmed.pass_at(search.k).value)

    def config_of(self, trial: FrozenTrial) -> str:
        """Return the whole config of a trial as YAML that trains the same."""
        return dump(self._trial_config(trial.params).config)

    def _trial_config(self, values: Mapping[str, Any]) -> Resolved:
        return overlay(self._resolved, values, "trial")

    def _objective(self, trial: optuna.Trial) -> float:
        if SLOT not in trial.user_attrs:  # another process took the last place between our look and our trial
            raise RuntimeError("no place left in the queue")
        values = self._space.suggest(trial)
        for other in self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            if other.params == trial.params and other.value is not None:
                trial.set_user_attr("duplicate_of", other.number)
                return other.value
        scores: list[float] = []

        def report(step: int, evaluation: Evaluation) -> None:
            if step == 0:
                return  # the same for all trials
            rates = evaluation.success_rates(self._resolved.config.search.k)
            trial.set_user_attr(rates_key(step), rates)
            scores.append(mean(rates))
            trial.report(scores[-1], step)
            self._console.say(f"  trial {trial.number}  iteration {step:>4}  {evaluation.summary()}")
            if trial.should_prune():
                raise Pruned(f"trial {trial.number} at iteration {step}")

        resolved = self._trial_config(values)
        settings = ", ".join(f"{key} = {value}" for key, value in values.items())
        self._console.say(f"  trial {trial.number}  {settings}")
        resumed = trial.user_attrs.get("run_id")
        nested = runs.Nested(self._parent, f"trial-{trial.number}")
        hooks = runs.Trial(nested, lambda run_id: trial.set_user_attr("run_id", run_id), report)
        try:
            stored = sources.find(resumed, resolved.config.tracking.uri) if resumed else None
            ended = runs.train(resolved, stored, hooks)
        except Pruned:
            raise optuna.TrialPruned from None
        except Interrupted as stop:
            self._stop = stop
            kept = {key: value for key, value in trial.user_attrs.items() if key in (SLOT, "run_id")}
            self._study.enqueue_trial(trial.params, user_attrs=kept)
            raise RuntimeError("interrupted") from None
        except Exception as error:
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            self._console.warn(f"trial {trial.number} failed: {kind}{error}")
            raise
        return scores[-1] if scores else mean(ended.progress.last_rates)


def progress(study: optuna.Study, started: float) -> str:
    """Return a line on where the study stands; `started` (monotonic) is when this process began."""
    trials = final_trials(study)
    ended = [trial for trial in trials if trial.state.is_finished()]
    complete = [trial for trial in ended if trial.value is not None and trial.state == TrialState.COMPLETE]
    text = f"study: {len(ended)} of {len(trials)} trials, {sum(t.state == TrialState.PRUNED for t in ended)} pruned"
    best = max(complete, key=lambda trial: trial.value or 0.0, default=None)
    if best is not None and best.intermediate_values:
        interval = rate_interval(best.user_attrs[rates_key(max(best.intermediate_values))])
        text += f", best so far {interval} (trial {best.number})"
    since = time.time() - (time.monotonic() - started)
    mine = [trial for trial in ended if trial.datetime_complete and trial.datetime_complete.timestamp() >= since]
    if mine and len(ended) < len(trials):
        seconds = (time.monotonic() - started) / len(mine) * (len(trials) - len(ended))
        text += f", about {seconds:.0f}s left"
    return text
