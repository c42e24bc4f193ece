"""A second, fairer look at the best trials.

The best of many noisy trials looks better than it is, because being lucky is one way to be the best. The finalists are
therefore measured again on fresh problems with more replicates, and the winner is named by that.

The best of several finalists is again lucky on the problems that made it the best. So the winner, the second and the
own settings are measured once more, on problems that have chosen nothing; the reported score and comparisons come from
those. Where there is one finalist, nothing was chosen on the first fresh problems, and they serve for that.

How much another training seed would change can only be learned by retraining: `search.retrain_seeds` asks for that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import optuna
from optuna.trial import FrozenTrial

from grpo_mlflow import runs, tasks
from grpo_mlflow.algorithm.statistics import Estimate, mean, rate_interval
from grpo_mlflow.config import Resolved, overlay
from grpo_mlflow.errors import UserError
from grpo_mlflow.runs.stored import find
from grpo_mlflow.runtime.console import Console
from grpo_mlflow.search import study as studies
from grpo_mlflow.search.trials import Search
from grpo_mlflow.tasks import contents

_SEED_STRIDE = 1_000_003  # far from the seeds that people choose


@dataclass(frozen=True, slots=True)
class Finalist:
    """A trial that was measured again.

    Args:
        selected: its pass@k in the search.
        rates: its pass@k on each fresh problem; a mean over the retrained models where there are some.
        replicates: completions of each fresh problem, over all models.
        retrained: pass@k of each model that was trained again with a seed of its own, on the fresh problems.
    """

    trial: FrozenTrial
    selected: Estimate
    rates: tuple[float, ...]
    replicates: int
    retrained: tuple[float, ...] = ()

    @property
    def confirmed(self) -> Estimate:
        """Its pass@k on the fresh problems, with the interval over problems."""
        return rate_interval(self.rates, self.replicates)


Measure = Callable[[FrozenTrial, int], Finalist]


def chosen_and_measured(trials: Sequence[FrozenTrial], measure: Measure) -> list[Finalist]:
    """Return the trials as finalists, best first: ranked by the first fresh problems, the first two measured on others.

    `measure` takes a trial and the number of the block of fresh problems, 0 or 1.
    """
    ranked = sorted((measure(trial, 0) for trial in trials), key=lambda finalist: -finalist.confirmed.value)
    if len(ranked) < 2:
        return ranked
    return [*(measure(finalist.trial, 1) for finalist in ranked[:2]), *ranked[2:]]


class Confirmation:
    """Measures trials of an ended study again. What was measured is kept in the study and not measured twice."""

    def __init__(self, resolved: Resolved, search: Search, study: optuna.Study, parent: str, console: Console) -> None:
        self._resolved, self._search, self._study = resolved, search, study
        self._parent, self._console = parent, console
        self._said: set[str] = set()

    def finalists(self) -> list[Finalist]:
        """Measure the best trials of the search and return them, best first by the new measure."""
        best = studies.ranked(studies.final_trials(self._study))
        chosen: list[FrozenTrial] = []
        for trial in best:  # one that shares another's result needs no measurement of its own
            if studies.DUPLICATE_OF not in trial.user_attrs and len(chosen) < self._resolved.config.search.finalists:
                chosen.append(trial)
        return chosen_and_measured(chosen, self.measure)

    def beside(self, trial: FrozenTrial, finalists: Sequence[Finalist]) -> Finalist:
        """Return another trial, measured on the problems that the winner's score comes from."""
        known = {finalist.trial.number: finalist for finalist in finalists[:2]}
        return known.get(trial.number) or self.measure(trial, min(1, len(finalists) - 1))

    def measure(self, trial: FrozenTrial, block: int) -> Finalist:
        """Measure a finished trial on a block of fresh problems, after retraining it where that is asked for."""
        search = self._resolved.config.search
        curve = studies.curve(trial)
        selected = rate_interval(curve[max(curve)], self._resolved.config.eval.replicates)
        models: list[tuple[str, str | None, int | None]] = [(f"{trial.number}", trial.user_attrs[studies.RUN_ID], None)]
        if search.retrain_seeds:
            models = [
                (f"{trial.number}-seed-{i}", None, self._resolved.config.seed + i * _SEED_STRIDE)
                for i in range(1, search.retrain_seeds + 1)
            ]
        rates = [self._rates(trial, block, name, run_id, seed) for name, run_id, seed in models]
        pooled = tuple(mean(each) for each in zip(*rates, strict=True))
        retrained = tuple(mean(r) for r in rates) if search.retrain_seeds else ()
        return Finalist(trial, selected, pooled, search.confirm_replicates * len(models), retrained)

    def _rates(self, trial: FrozenTrial, block: int, model: str, run_id: str | None, seed: int | None) -> list[float]:
        search, evaluation = self._resolved.config.search, self._resolved.config.eval
        name = f"{'final' if block else 'confirm'}-{model}"
        first = search.confirm_seed_start + block * search.confirm_num_ids
        fresh = {
            "eval.id_seed_start": first,
            "eval.num_ids": search.confirm_num_ids,
            "eval.replicates": search.confirm_replicates,
            "search.finalists": 0,  # those problems are in use now
        }
        key = ":".join(["confirmed", name, *map(str, fresh.values())])
        if (known := self._study.user_attrs.get(key)) is not None:
            return [float(rate) for rate in known]
        if run_id is None:
            run_id = self._retrain(trial, f"retrain-{model}", seed)
        which = "best" if search.objective == "best" else "last"
        stored = find(run_id, self._resolved.config.tracking.uri, which)
        if stored.checkpoint is None:
            raise UserError(f"trial {trial.number}: its run {run_id} has no checkpoint to confirm")
        config = overlay(self._search.config_of(trial.params), fresh, "confirmation")
        nested = runs.Nested(self._parent, name, {"optuna.trial": str(trial.number)})
        before = [  # what has chosen the trial: the search's problems, and those that ranked the finalists
            range(evaluation.id_seed_start, evaluation.id_seed_start + evaluation.num_ids),
            range(search.confirm_seed_start, first),
        ]
        problems, remark = contents.evaluation_problems(tasks.of(config.config), config.config, before)
        if remark and remark not in self._said:
            self._said.add(remark)
            self._console.say(f"  fresh problems from seed {first}: {remark}")
        self._console.say(f"  {name}: {len(problems)} problems x {search.confirm_replicates}")
        rates = runs.evaluate(config, stored.checkpoint.path, nested, before).success_rates(search.k)
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
