"""A second, fairer look at the best trials.

The best of many noisy trials looks better than it is, because being lucky is one way to be the best. The finalists are
therefore measured again on fresh problems with more replicates, and the winner is named by that.

The best of several is again lucky on the problems that made it the best, and so are the config's own settings where
they win. So those, the winner and the second are measured once more, on problems that have chosen nothing; the reported
score and comparisons come from there. Where only one trial is measured, nothing was chosen on the first fresh problems,
and they serve for that.

How much another training seed would change can only be learned by retraining: `search.retrain_seeds` asks for that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import optuna
from optuna.trial import FrozenTrial, TrialState

from grpo_mlflow import runs, tracking
from grpo_mlflow.algorithm.statistics import Estimate, mean, rate_interval
from grpo_mlflow.config import Resolved, overlay
from grpo_mlflow.errors import StoreAway, UserError
from grpo_mlflow.runs.stored import Stored, find
from grpo_mlflow.runtime.console import Console
from grpo_mlflow.search import blocks, records, settings
from grpo_mlflow.search import study as studies

_SEED_STRIDE = 1_000_003  # far from the seeds that people choose


@dataclass(frozen=True, slots=True)
class Model:
    """The model of a run, and its pass@k on each fresh problem."""

    run_id: str
    rates: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Finalist:
    """A trial that was measured again, on problems that are fresh where the task has such.

    Args:
        selected: its pass@k in the search.
        rates: its pass@k on each fresh problem; a mean over the retrained models where there are some.
        replicates: completions of each fresh problem, over all models.
        retrained: pass@k of each model that was trained again with a seed of its own, on the fresh problems.
        models: what was measured: the trial's own model, or those that were trained again.
        ranked_by_these: whether these problems ranked the finalists, which favours the first of them.
        fresh: whether the problems were not asked before.
    """

    trial: FrozenTrial
    selected: Estimate
    rates: tuple[float, ...]
    replicates: int
    retrained: tuple[float, ...] = ()
    models: tuple[Model, ...] = ()
    ranked_by_these: bool = False
    fresh: bool = True

    @property
    def where(self) -> str:
        """On which problems it was measured, in words."""
        if not self.fresh:
            return f"{len(self.rates)} problems that chose the winner, as the task has no fresh ones: optimistic"
        return "the problems that ranked the finalists" if self.ranked_by_these else "fresh problems"

    @property
    def confirmed(self) -> Estimate:
        """Its pass@k on the fresh problems, with the interval over problems."""
        return rate_interval(self.rates, self.replicates)

    @property
    def typical(self) -> Model:
        """The model whose own pass@k is nearest to that of all: the best of some seeds would be a lucky one."""
        return min(self.models, key=lambda model: abs(mean(model.rates) - mean(self.rates)))


Measure = Callable[[FrozenTrial, int], Finalist]


def chosen_and_measured(
    trials: Sequence[FrozenTrial], measure: Measure, own: FrozenTrial | None = None
) -> tuple[list[Finalist], Finalist | None]:
    """Return the trials as finalists, best first, and the trial of the own settings.

    The first fresh problems rank all of them; own settings that are not among the trials come first if they are the
    best. The first two and the own settings are then measured on other problems, which change nothing about the order.
    `measure` takes a trial and the number of the block of fresh problems, 0 or 1.
    """
    if not trials:
        return [], None
    finalists = {trial.number for trial in trials}
    beside = [own] if own is not None and own.number not in finalists else []
    ranked = sorted((measure(trial, 0) for trial in [*trials, *beside]), key=lambda each: -each.confirmed.value)
    numbers = [each.trial.number for each in ranked if each is ranked[0] or each.trial.number in finalists]
    found = {each.trial.number: replace(each, ranked_by_these=len(ranked) > 1) for each in ranked}
    if len(ranked) > 1:
        again = {*numbers[:2]} | ({own.number} if own is not None else set())
        found |= {each.trial.number: measure(each.trial, 1) for each in ranked if each.trial.number in again}
    return [found[number] for number in numbers], found[own.number] if own is not None else None


class Confirmation:
    """Measures trials of an ended study again. What was measured is kept in the study and not measured twice."""

    def __init__(self, resolved: Resolved, study: optuna.Study, parent: str, console: Console) -> None:
        self._resolved, self._study = resolved, study
        self._parent, self._console = parent, console
        self._said: set[str] = set()
        self._blocks: dict[int, blocks.Block] = {}

    def finalists(self) -> tuple[list[Finalist], Finalist | None]:
        """Measure the best trials of the search; return them, best first by the new measure, and the own settings.

        A trial whose run is gone from the MLflow store is left out, and the next one takes its place.
        """
        chosen: list[FrozenTrial] = []
        for trial in studies.ranked(studies.final_trials(self._study)):
            if len(chosen) >= self._resolved.config.search.finalists:
                break
            # One that shares another's result needs no measurement of its own.
            if studies.DUPLICATE_OF not in trial.user_attrs and self.is_there(trial):
                chosen.append(trial)
        return chosen_and_measured(chosen, self.measure, self._own_settings() if chosen else None)

    def _own_settings(self) -> FrozenTrial | None:
        """Return the trial of the config's own settings, if it can be measured."""
        marked = [trial for trial in studies.final_trials(self._study) if trial.user_attrs.get(studies.OWN)]
        if not marked or marked[0].state != TrialState.COMPLETE:
            return None
        own = self._study.trials[marked[0].user_attrs.get(studies.DUPLICATE_OF, marked[0].number)]
        return own if self.is_there(own) else None

    def is_there(self, trial: FrozenTrial) -> bool:
        """Return whether MLflow still has the run of a finished trial and its checkpoint, and say once if not."""
        try:
            self._stored(trial)
        except StoreAway:
            raise
        except UserError as error:
            self._say(f"trial {trial.number}: left out: {error}", self._console.warn)
            return False
        return True

    def measure(self, trial: FrozenTrial, number: int) -> Finalist:
        """Measure a finished trial on a block of fresh problems, after retraining it where that is asked for."""
        search, run_id = self._resolved.config.search, trial.user_attrs[studies.RUN_ID]
        block = self._block(number)
        rates_then = studies.judged(list(studies.curve(trial).values()), search.objective, search.objective_window)
        selected = rate_interval(rates_then, self._resolved.config.eval.replicates)
        config = settings.of_run(self._resolved, self._stored(trial).config, trial.params)
        if search.retrain_seeds:
            models = [self._retrained(trial, config, block, i) for i in range(1, search.retrain_seeds + 1)]
        else:
            models = [self._measured(trial, config, block, f"{trial.number}", run_id)]
        pooled = tuple(mean(each) for each in zip(*(model.rates for model in models), strict=True))
        retrained = tuple(mean(model.rates) for model in models) if search.retrain_seeds else ()
        return Finalist(
            *(trial, selected, pooled, search.confirm_replicates * len(models)),
            retrained=retrained,
            models=tuple(models),
            fresh=block.fresh,
        )

    def _say(self, line: str, say: Callable[[str], None]) -> None:
        if line not in self._said:
            self._said.add(line)
            say(line)

    def _block(self, number: int) -> blocks.Block:
        if number not in self._blocks:
            self._blocks[number] = blocks.block(self._resolved, number)
        return self._blocks[number]

    def _stored(self, trial: FrozenTrial) -> Stored:
        """Return the run of a trial with the checkpoint that it is judged by.

        Raises:
            UserError: it was deleted, or files of it are gone.
        """
        uri, run_id = self._resolved.config.tracking.uri, trial.user_attrs[studies.RUN_ID]
        if not tracking.lives(tracking.connect(uri), run_id):
            raise UserError(f"its run {run_id} was deleted in MLflow")
        stored = find(run_id, uri, self._which)
        if stored.checkpoint is None:
            raise UserError(f"run {run_id}: its checkpoint is gone from MLflow")
        return stored

    @property
    def _which(self) -> str:
        return "best" if self._resolved.config.search.objective == "best" else "last"

    def _measured(self, trial: FrozenTrial, config: Resolved, block: blocks.Block, model: str, run_id: str) -> Model:
        search, name = self._resolved.config.search, f"{block.name}-{model}"
        key = ":".join(["fresh", name, *map(str, block.settings.values())])  # "confirmed": what repeats counted as well
        if (known := records.kept(self._study).get(key)) is not None:
            return Model(run_id, tuple(float(rate) for rate in known))
        checkpoint = find(run_id, self._resolved.config.tracking.uri, self._which).checkpoint
        if checkpoint is None:
            raise UserError(f"trial {trial.number}: its run {run_id} has no checkpoint to confirm")
        if block.remark:
            self._say(block.remark, self._console.say)
        self._console.say(f"  {name}: {block.problems} problems x {search.confirm_replicates}")
        tags = {"optuna.trial": str(trial.number), "study.problems": "fresh" if block.fresh else "asked before"}
        measuring = overlay(config, block.settings, "confirmation")
        nested = runs.Nested(self._parent, name, tags)
        rates = runs.evaluate(measuring, checkpoint.path, nested, block.before).success_rates(search.k)
        records.keep(self._study, key, rates)
        return Model(run_id, tuple(rates))

    def _retrained(self, trial: FrozenTrial, config: Resolved, block: blocks.Block, number: int) -> Model:
        """Train a trial's settings again with another seed and measure that. One that was interrupted goes on."""
        name = f"{trial.number}-seed-{number}"
        seed = self._resolved.config.seed + number * _SEED_STRIDE
        uri, key = self._resolved.config.tracking.uri, f"retrained:retrain-{name}"
        known = self._study.user_attrs.get(key)
        try:
            stored = None
            if known and tracking.lives(tracking.connect(uri), known):
                tracking.require_free(uri, known)
                stored = find(known, uri)
        except StoreAway:
            raise
        except UserError:  # files of it are gone
            stored = None
        if stored is not None and stored.damaged:  # from the beginning, in the same run, it would log all again
            stored = None
        if stored is None or stored.checkpoint is None or stored.checkpoint.iteration < config.config.train.iterations:
            self._console.say(f"  retrain-{name}: trains again with seed {seed}")
            nested = runs.Nested(self._parent, f"retrain-{name}", {"optuna.trial": str(trial.number)})
            hooks = runs.Trial(nested, lambda run_id: self._study.set_user_attr(key, run_id))
            known = runs.train(overlay(config, {"seed": seed}, "confirmation"), stored, hooks).run_id
        return self._measured(trial, config, block, name, str(known))
