"""A second, fairer look at the best trials.

The best of many noisy trials looks better than it is, because being lucky is one way to be the best. The finalists are
therefore measured again on fresh problems with more replicates, and the winner is named by that. How much another
training seed would change can only be learned by retraining: `search.retrain_seeds` asks for that.
"""

from __future__ import annotations

from dataclasses import dataclass

import optuna
from optuna.trial import FrozenTrial

from grpo_mlflow import runs
from grpo_mlflow.algorithm.statistics import Estimate, mean, rate_interval
from grpo_mlflow.config import Resolved, overlay
from grpo_mlflow.errors import UserError
from grpo_mlflow.runs.stored import find
from grpo_mlflow.runtime.console import Console
from grpo_mlflow.search import study as studies
from grpo_mlflow.search.trials import Search

_SEED_STRIDE = 1_000_003  # far from the seeds that people choose


@dataclass(frozen=True, slots=True)
class Finalist:
    """A trial that was measured again.

    Args:
        selected: its pass@k in the search.
        rates: its pass@k on each fresh problem; a mean over the retrained models where there are some.
        retrained: pass@k of each model that was trained again with a seed of its own, on the fresh problems.
    """

    trial: FrozenTrial
    selected: Estimate
    rates: tuple[float, ...]
    retrained: tuple[float, ...] = ()

    @property
    def confirmed(self) -> Estimate:
        """Its pass@k on the fresh problems, with the interval over problems."""
        return rate_interval(self.rates)


class Confirmation:
    """Measures trials of an ended study again. What was measured is kept in the study and not measured twice."""

    def __init__(self, resolved: Resolved, search: Search, study: optuna.Study, parent: str, console: Console) -> None:
        self._resolved, self._search, self._study = resolved, search, study
        self._parent, self._console = parent, console

    def finalists(self) -> list[Finalist]:
        """Measure the best trials of the search and return them, best first by the new measure."""
        best = studies.ranked(studies.final_trials(self._study))
        chosen: list[FrozenTrial] = []
        for trial in best:  # one that shares another's result needs no measurement of its own
            if studies.DUPLICATE_OF not in trial.user_attrs and len(chosen) < self._resolved.config.search.finalists:
                chosen.append(trial)
        found = [self.measure(trial) for trial in chosen]
        return sorted(found, key=lambda finalist: -finalist.confirmed.value)

    def measure(self, trial: FrozenTrial) -> Finalist:
        """Measure a finished trial on the fresh problems, after retraining it where that is asked for."""
        search = self._resolved.config.search
        curve = studies.curve(trial)
        selected = rate_interval(curve[max(curve)], self._resolved.config.eval.replicates)
        models: list[tuple[str, str | None, int | None]] = [
            (f"confirm-{trial.number}", trial.user_attrs[studies.RUN_ID], None)
        ]
        if search.retrain_seeds:
            models = [
                (f"confirm-{trial.number}-seed-{i}", None, self._resolved.config.seed + i * _SEED_STRIDE)
                for i in range(1, search.retrain_seeds + 1)
            ]
        rates = [self._rates(trial, name, run_id, seed) for name, run_id, seed in models]
        pooled = tuple(mean(each) for each in zip(*rates, strict=True))
        return Finalist(trial, selected, pooled, tuple(mean(r) for r in rates) if search.retrain_seeds else ())

    def _rates(self, trial: FrozenTrial, name: str, run_id: str | None, seed: int | None) -> list[float]:
        search = self._resolved.config.search
        fresh = {
            "eval.id_seed_start": search.confirm_seed_start,
            "eval.num_ids": search.confirm_num_ids,
            "eval.replicates": search.confirm_replicates,
            "search.finalists": 0,  # those problems are in use now
        }
        key = ":".join(["confirmed", name, *map(str, fresh.values())])
        if (known := self._study.user_attrs.get(key)) is not None:
            return [float(rate) for rate in known]
        if run_id is None:
            run_id = self._retrain(trial, name.replace("confirm", "retrain"), seed)
        which = "best" if search.objective == "best" else "last"
        stored = find(run_id, self._resolved.config.tracking.uri, which)
        if stored.checkpoint is None:
            raise UserError(f"trial {trial.number}: its run {run_id} has no checkpoint to confirm")
        config = overlay(self._search.config_of(trial.params), fresh, "confirmation")
        self._console.say(f"  {name}: {search.confirm_num_ids} fresh problems x {search.confirm_replicates}")
        nested = runs.Nested(self._parent, name, {"optuna.trial": str(trial.number)})
        rates = runs.evaluate(config, stored.checkpoint.path, nested).success_rates(search.k)
        self._study.set_user_attr(key, rates)
        return rates

    def _retrain(self, trial: FrozenTrial, name: str, seed: int | None) -> str:
        """Train a trial's settings again with another seed; return the run. One that was interrupted goes on."""
        key = f"retrained:{name}"
        known = self._study.user_attrs.get(key)
        config = overlay(self._search.config_of(trial.params), {"seed": seed}, "confirmation")
        stored = find(known, config.config.tracking.uri) if known else None
        if stored is None or stored.checkpoint is None or stored.checkpoint.iteration < config.config.train.iterations:
            self._console.say(f"  {name}: trains again with seed {seed}")
            nested = runs.Nested(self._parent, name, {"optuna.trial": str(trial.number)})
            hooks = runs.Trial(nested, lambda run_id: self._study.set_user_attr(key, run_id))
            return runs.train(config, stored, hooks).run_id
        assert known is not None
        return str(known)
