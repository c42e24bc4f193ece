"""A second, fairer look at the best trials.

The best of many noisy trials looks better than it is, because being lucky is one way to be the best. The finalists are
therefore measured again on fresh problems with more replicates, and the winner is named by that. How much another
training seed would change can only be learned by retraining: `search.retrain_seeds` asks for that.
"""

from __future__ import annotations

from dataclasses import dataclass

import optuna
from optuna.trial import FrozenTrial

from grpo_mlflow import runs, tracking
from grpo_mlflow.algorithm.statistics import Estimate, mean, rate_interval
from grpo_mlflow.config import Resolved, overlay
from grpo_mlflow.errors import StoreAway, UserError
from grpo_mlflow.runs.stored import Stored, find
from grpo_mlflow.runtime.console import Console
from grpo_mlflow.search import records, settings
from grpo_mlflow.search import study as studies

_SEED_STRIDE = 1_000_003  # far from the seeds that people choose


@dataclass(frozen=True, slots=True)
class Model:
    """The model of a run, and its pass@k on each fresh problem."""

    run_id: str
    rates: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Finalist:
    """A trial that was measured again.

    Args:
        selected: its pass@k in the search.
        rates: its pass@k on each fresh problem; a mean over the retrained models where there are some.
        retrained: pass@k of each model that was trained again with a seed of its own, on the fresh problems.
        models: what was measured: the trial's own model, or those that were trained again.
    """

    trial: FrozenTrial
    selected: Estimate
    rates: tuple[float, ...]
    retrained: tuple[float, ...] = ()
    models: tuple[Model, ...] = ()

    @property
    def confirmed(self) -> Estimate:
        """Its pass@k on the fresh problems, with the interval over problems."""
        return rate_interval(self.rates)

    @property
    def typical(self) -> Model:
        """The model whose own pass@k is nearest to that of all: the best of some seeds would be a lucky one."""
        return min(self.models, key=lambda model: abs(mean(model.rates) - mean(self.rates)))


def with_own(finalists: list[Finalist], own: Finalist | None) -> list[Finalist]:
    """Return the finalists led by the config's own settings where those are better than all, though no finalist."""
    beaten = own is None or own.confirmed.value <= finalists[0].confirmed.value
    return finalists if own is None or beaten else [own, *finalists]


class Confirmation:
    """Measures trials of an ended study again. What was measured is kept in the study and not measured twice."""

    def __init__(self, resolved: Resolved, study: optuna.Study, parent: str, console: Console) -> None:
        self._resolved, self._study = resolved, study
        self._parent, self._console = parent, console

    def finalists(self) -> list[Finalist]:
        """Measure the best trials of the search and return them, best first by the new measure.

        A trial whose run is gone from the MLflow store is left out, and the next one takes its place.
        """
        found: list[Finalist] = []
        for trial in studies.ranked(studies.final_trials(self._study)):
            if len(found) >= self._resolved.config.search.finalists:
                break
            # One that shares another's result needs no measurement of its own.
            if studies.DUPLICATE_OF not in trial.user_attrs and (finalist := self.measure(trial)) is not None:
                found.append(finalist)
        return sorted(found, key=lambda finalist: -finalist.confirmed.value)

    def measure(self, trial: FrozenTrial) -> Finalist | None:
        """Measure a finished trial on the fresh problems, after retraining it where that is asked for.

        None if its run is gone.
        """
        search, stored = self._resolved.config.search, self._stored(trial)
        if stored is None or stored.checkpoint is None:
            run_id = trial.user_attrs[studies.RUN_ID]
            missing = "run" if stored is None else "checkpoint of its run"
            self._console.warn(f"trial {trial.number}: left out, since the {missing} {run_id} is gone from MLflow")
            return None
        rates_then = list(studies.curve(trial).values())
        selected = rate_interval(studies.judged(rates_then, search.objective, search.objective_window))
        config = settings.of_run(self._resolved, stored.config, trial.params)
        if not search.retrain_seeds:
            run_id = trial.user_attrs[studies.RUN_ID]
            models = [self._measured(trial, config, f"confirm-{trial.number}", run_id)]
        else:
            models = [self._retrained(trial, config, i) for i in range(1, search.retrain_seeds + 1)]
        pooled = tuple(mean(each) for each in zip(*(model.rates for model in models), strict=True))
        retrained = tuple(mean(model.rates) for model in models) if search.retrain_seeds else ()
        return Finalist(trial, selected, pooled, retrained, tuple(models))

    def _stored(self, trial: FrozenTrial) -> Stored | None:
        """Return the run of a trial with the checkpoint that it is judged by; None if it is gone."""
        uri, run_id = self._resolved.config.tracking.uri, trial.user_attrs[studies.RUN_ID]
        try:
            return find(run_id, uri, self._which) if tracking.lives(tracking.connect(uri), run_id) else None
        except StoreAway:
            raise
        except UserError:  # its files are gone
            return None

    @property
    def _which(self) -> str:
        return "best" if self._resolved.config.search.objective == "best" else "last"

    def _measured(self, trial: FrozenTrial, config: Resolved, name: str, run_id: str) -> Model:
        search = self._resolved.config.search
        fresh = {
            "eval.id_seed_start": search.confirm_seed_start,
            "eval.num_ids": search.confirm_num_ids,
            "eval.replicates": search.confirm_replicates,
            "search.finalists": 0,  # those problems are in use now
        }
        key = ":".join(["confirmed", name, *map(str, fresh.values())])
        if (known := records.kept(self._study).get(key)) is not None:
            return Model(run_id, tuple(float(rate) for rate in known))
        checkpoint = find(run_id, self._resolved.config.tracking.uri, self._which).checkpoint
        if checkpoint is None:
            raise UserError(f"trial {trial.number}: its run {run_id} has no checkpoint to confirm")
        self._console.say(f"  {name}: {search.confirm_num_ids} fresh problems x {search.confirm_replicates}")
        nested = runs.Nested(self._parent, name, {"optuna.trial": str(trial.number)})
        found = runs.evaluate(overlay(config, fresh, "confirmation"), checkpoint.path, nested)
        rates = found.success_rates(search.k)
        records.keep(self._study, key, rates)
        return Model(run_id, tuple(rates))

    def _retrained(self, trial: FrozenTrial, config: Resolved, number: int) -> Model:
        """Train a trial's settings again with another seed and measure that. One that was interrupted goes on."""
        name = f"{trial.number}-seed-{number}"
        seed = self._resolved.config.seed + number * _SEED_STRIDE
        uri, key = self._resolved.config.tracking.uri, f"retrained:retrain-{name}"
        known = self._study.user_attrs.get(key)
        stored = find(known, uri) if known and tracking.lives(tracking.connect(uri), known) else None
        if stored is None or stored.checkpoint is None or stored.checkpoint.iteration < config.config.train.iterations:
            self._console.say(f"  retrain-{name}: trains again with seed {seed}")
            nested = runs.Nested(self._parent, f"retrain-{name}", {"optuna.trial": str(trial.number)})
            hooks = runs.Trial(nested, lambda run_id: self._study.set_user_attr(key, run_id))
            known = runs.train(overlay(config, {"seed": seed}, "confirmation"), stored, hooks).run_id
        return self._measured(trial, config, f"confirm-{name}", str(known))
