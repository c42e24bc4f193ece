"""Running the trials of a study: settings from the sampler, a training run for each, its scores to the pruner."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from grpo_mlflow import runs, seeding
from grpo_mlflow.algorithm.statistics import mean, rate_interval
from grpo_mlflow.config import Config, Resolved, overlay
from grpo_mlflow.errors import Pruned, ServerFailed, StoreAway, UserError, redact
from grpo_mlflow.runs import naming, stored
from grpo_mlflow.runtime import interrupts
from grpo_mlflow.runtime.console import Console
from grpo_mlflow.runtime.interrupts import Interrupted
from grpo_mlflow.search import choices, decay, kept, records, recovery, settings
from grpo_mlflow.search import study as studies
from grpo_mlflow.search.paired import UNTRAINED, rates_key
from grpo_mlflow.search.space import Space
from grpo_mlflow.training.evaluation import Evaluation
from grpo_mlflow.training.progress import Progress

_JUDGED = "judged"  # [step, whether the pruner ended the trial there]: its last decision
Train = Callable[[Resolved, "stored.Stored | None", runs.Trial], object]


_MOST_DRAWN = 20  # times that the sampler may propose known settings in one place
_MOST_LISTED = 2_000  # settings; of a larger space, and of a continuous one, the sampler draws again


class _DrawnBefore(Exception):
    """The settings of a trial are those of an earlier one, and others take its place."""


class Search:
    """Runs trials of a study under one parent run.

    Args:
        baseline: the evaluation of the untrained model, which trials share; None: each makes its own.
        train: what a trial does; it calls the hooks of the `runs.Trial` that it is given.
    """

    def __init__(
        self,
        resolved: Resolved,
        space: Space,
        study: optuna.Study,
        queue: studies.Queue,
        parent: str,
        console: Console,
        *,
        baseline: Evaluation | None = None,
        train: Train = runs.train,
        obey: Callable[[], None] = lambda: None,
    ) -> None:
        self._resolved, self._space, self._study, self._queue = resolved, space, study, queue
        self._parent, self._console = parent, console
        self._baseline, self._train, self._obey = baseline, train, obey
        self._started = time.monotonic()
        self._unsigned: recovery.Unsigned = {}
        self._exhausted = False
        self._runs: list[str] = []

    def run(self, between: Callable[[], None] = lambda: None) -> None:
        """Run trials until no place is left or the time is up. A failed trial does not end the study.

        `between` is called before each trial. In the end, what they could not send to MLflow is sent.
        """
        while True:
            interrupts.check()
            between()
            if self._time_is_up or not self._queue.fill():
                kept.send_own(self._resolved.config.tracking.uri, self._runs, self._console)
                self._runs.clear()
                return
            if self._run_one():
                said = studies.progress(self._study, len(self._queue), self._started, self._resolved.config)
                self._console.say(said)

    def revive(self) -> None:
        """Put back the trials whose process is gone."""
        for line in recovery.revive(self._study, self._unsigned):
            self._console.warn(line)

    def config_of(self, values: Mapping[str, Any]) -> Resolved:
        """Return the config with a trial's settings."""
        return overlay(self._resolved, values, "trial")

    @property
    def _time_is_up(self) -> bool:
        limit = self._resolved.config.search.timeout
        return limit is not None and time.monotonic() - self._started > limit

    def _run_one(self) -> bool:
        """Run a trial; return whether its place has ended."""
        with interrupts.deferred():  # a signal finds a trial to put back
            trial = self._study.ask()
            if (slot := trial.user_attrs.get(studies.SLOT)) is not None:
                drawn = trial.user_attrs.get(studies.DRAWN, 0)
                self._study.sampler = choices.sampler(self._resolved.config, slot, drawn)
                return self._run(trial)
            # Another process took the last place between our look and our trial.
            trial.set_user_attr("note", "no failure: no place was left")
            self._study.tell(trial, state=TrialState.FAIL)
            return False

    def _run(self, trial: optuna.Trial) -> bool:
        try:
            with recovery.owned(trial), interrupts.let_through():
                values = self._perform(trial)
        except Pruned:
            self._tell(trial, state=TrialState.PRUNED)
        except _DrawnBefore:
            self._tell(trial, state=TrialState.FAIL)
            return False
        except (Interrupted, KeyboardInterrupt, StoreAway, ServerFailed):  # the trials behind it would fare no better
            recovery.put_back(self._study, trial)
            raise
        except Exception as error:
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            self._console.warn(f"trial {trial.number} failed: {kind}{error}")
            if recovery.is_own(trial):
                trial.set_user_attr("error", redact(f"{kind}{error}")[:500])
                self._tell(trial, state=TrialState.FAIL)
        else:
            self._tell(trial, values)
        return True

    def _tell(self, trial: optuna.Trial, values: list[float] | None = None, state: TrialState | None = None) -> None:
        if recovery.is_own(trial):
            self._study.tell(trial, values, state)
        else:
            self._console.warn(f"trial {trial.number}: another process has it, and will end it")

    def _perform(self, trial: optuna.Trial) -> list[float]:
        """Return the objective values of a trial: those of an equal one, or those of a training run."""
        stored = recovery.run_of(trial, self._resolved.config.tracking.uri, self._parent, self._console.warn)
        with interrupts.deferred():  # a sampler that is asked for the rest would begin with the draws of the first
            begun = stored is not None and bool(stored.config)
            values = self._space.suggest(trial, recovery.drawn(trial) if begun else None)
            resolved = self.config_of(values)
            if stored is not None and begun:  # it goes on with what it began with
                recovery.complete(self._study, trial)
                resolved = settings.of_run(self._resolved, stored.config, values)
            trial.set_user_attr(studies.VARIED, list(values))
            trial.set_user_attr(studies.SETTINGS, settings.digest(resolved.config))
            trial.set_user_attr(studies.SETTLED, True)
            baseline = self._baseline if settings.untrained_alike(resolved.config, self._resolved.config) else None
            records.keep_of(trial, decay.KEY, decay.learning_rates(resolved.config))
            records.keep_of(trial, UNTRAINED, baseline.success_rates(resolved.config.search.k) if baseline else [])
        if (equal := self._equal(trial)) is not None:
            self._draw_again(trial, equal)
            trial.set_user_attr(studies.DUPLICATE_OF, equal.number)
            self._console.say(f"  trial {trial.number} has the settings of trial {equal.number} and shares its result")
            if equal.state == TrialState.PRUNED:
                raise Pruned(f"as trial {equal.number}")
            assert equal.values is not None
            return list(equal.values)
        self._console.say(f"  trial {trial.number}  {', '.join(f'{key} = {value}' for key, value in values.items())}")
        self._repeat_reports(trial, stored)
        slot = str(trial.user_attrs[studies.SLOT])
        tags = {"optuna.trial": str(trial.number), "optuna.study": self._study.study_name, recovery.SLOT_TAG: slot}
        hooks = runs.Trial(
            runs.Nested(self._parent, naming.of_trial(trial.number, values), tags),
            lambda run_id: self._started_as(trial, run_id),
            lambda progress, evaluation: self._report(trial, resolved.config, progress, evaluation),
            baseline,
        )
        self._train(resolved, stored, hooks)
        return self._values(trial)

    def _started_as(self, trial: optuna.Trial, run_id: str) -> None:
        trial.set_user_attr(studies.RUN_ID, run_id)
        self._runs.append(run_id)
        _, pruned = self._judged(trial)
        if pruned:  # its process died before it had ended it
            raise Pruned(f"trial {trial.number}")

    def _judged(self, trial: optuna.Trial) -> tuple[int, bool]:
        step, pruned = records.kept_at(records.now(trial), _JUDGED) or (0, False)
        return step, pruned

    def _report(self, trial: optuna.Trial, config: Config, progress: Progress, evaluation: Evaluation) -> None:
        self._obey()
        step = progress.iteration
        if step == 0:
            return  # the same for all trials
        recovery.require_own(trial)
        with interrupts.deferred():  # or what the pruner has noted would be there, and its decision not
            trial.set_user_attr(studies.TOKENS, progress.tokens)
            trial.set_user_attr(studies.SECONDS, progress.seconds)
            pruned = self._judge(trial, config, step, evaluation.success_rates(config.search.k))
            trial.set_user_attr(studies.SCORE, self._score(trial))
        found = rate_interval(evaluation.success_rates(config.search.k), config.eval.replicates)
        self._console.say(f"  trial {trial.number}  iteration {step:>4}  pass@{config.search.k} {found}")
        if pruned:
            raise Pruned(f"trial {trial.number} at iteration {step}")

    def _judge(self, trial: optuna.Trial, config: Config, step: int, rates: list[float]) -> bool:
        """Keep what the trial has reached at a step; return whether the pruner ends it there.

        A trial that was put back comes again to steps between its checkpoint and its end. What was decided there holds:
        the pruner would see the later reports, and asha has counted the trial already.
        """
        records.keep_of(trial, rates_key(step), rates)
        if len(self._study.directions) > 1:
            return False  # Optuna neither takes reports nor prunes there
        records.report(trial, step, mean(rates))
        last, pruned = self._judged(trial)
        if step > last:
            now = records.now(trial)
            pruned = step < config.train.iterations and bool(self._study.pruner.prune(self._study, now))
            records.keep_of(trial, _JUDGED, [step, pruned])
        return pruned

    def _repeat_reports(self, trial: optuna.Trial, stored: stored.Stored | None) -> None:
        """Report what a copy that an earlier version put back has not, up to the checkpoint that it goes on from."""
        reached = stored.checkpoint.iteration if stored and stored.checkpoint else 0
        known = records.now(trial).intermediate_values
        for step, rates in studies.curve(trial).items():
            if step <= reached and step not in known and len(self._study.directions) == 1:
                records.report(trial, step, mean(rates))

    def _values(self, trial: optuna.Trial) -> list[float]:
        search = self._resolved.config.search
        if not studies.curve(trial):
            raise UserError(f"trial {trial.number} ended without an evaluation")
        value = self._score(trial)
        if len(self._study.directions) == 1:
            return [value]
        return [value, float(trial.user_attrs[search.cost])]

    def _score(self, trial: optuna.Trial) -> float:
        search, rates = self._resolved.config.search, list(studies.curve(trial).values())
        return mean(studies.judged(rates, search.objective, search.objective_window))

    def _equal(self, trial: optuna.Trial) -> FrozenTrial | None:
        """Return a trial with the same settings that was finished or pruned, after waiting for those begun earlier."""
        mine = trial.user_attrs[studies.SETTINGS]
        while True:
            others = [
                other
                for other in self._study.get_trials(deepcopy=False)
                if studies.SLOT in other.user_attrs and other.number != trial.number
            ]
            equal = [
                other  # an earlier version noted no settings
                for other in others
                if other.user_attrs.get(studies.SETTINGS, mine if other.params == trial.params else "") == mine
            ]
            for other in equal:
                own = studies.DUPLICATE_OF not in other.user_attrs
                if own and other.state in (TrialState.COMPLETE, TrialState.PRUNED):
                    return other
            # By when they started, as one that was put back has a low number: of two, one waits for the other.
            running = [o for o in others if o.state == TrialState.RUNNING and _start(o) < _start(trial)]
            # One without all of its settings yet may turn out to be equal, too.
            if not any(other in equal or studies.SETTLED not in other.user_attrs for other in running):
                return None
            self.revive()
            time.sleep(0.2)

    def _draw_again(self, trial: optuna.Trial, equal: FrozenTrial) -> None:
        """Raise _DrawnBefore after giving the place of the trial to other settings, where there are any."""
        marks = trial.user_attrs
        prescribed = bool(studies.fixed(records.now(trial))) and studies.DRAWN not in marks
        if prescribed or studies.RUN_ID in marks or marks.get(studies.DRAWN, 0) >= _MOST_DRAWN:
            return
        fixed: dict[str, Any] = {}
        if (every := self._space.all_settings(_MOST_LISTED)) is not None:
            others = self._study.get_trials(deepcopy=False)
            tried = {settings.rounded(other.params or studies.fixed(other)) for other in others}
            left = [each for each in every if settings.rounded(each) not in tried]
            if not left:
                if not self._exhausted:
                    self._console.say("the space holds no further settings: what is left shares results")
                self._exhausted = True
                return
            draws = seeding.stream(self._resolved.config.seed, "drawn again", trial.number)
            fixed = left[int(draws.integers(len(left)))]
        trial.set_user_attr("note", f"no failure: settings of trial {equal.number}, so its place has others")
        studies.draw_again(self._study, trial, fixed)
        raise _DrawnBefore


def _start(trial: FrozenTrial | optuna.Trial) -> tuple[datetime, int]:
    assert trial.datetime_start is not None, "it runs"
    return trial.datetime_start, trial.number
