"""A pruner that compares trials problem by problem.

All trials are evaluated on the same problems with the same random draws, so the difference between two trials at the
same step is a mean of paired differences: its spread does not contain that between easy and hard problems, which is
most of the noise of pass@k (Miller 2024, arXiv 2411.00640, section 4.2). With the paired differences d_i of one
evaluation of n problems, the upper confidence bound of their mean is

    U(d; q) = mean(d) + q * sd(d) / sqrt(n)

The best are the finished trials of rank 1 to r = ceil(top * trials so far); the last of them is the contender. Until
ten trials have begun there is one. With d the trial's success rates at an evaluation minus those of another, it is
pruned if

    its learning rate has decayed (decay.py)
    U(against one of the best at the same step; t) < -margin    at its last two evaluations: it is behind
    U(against the contender's score; doubt) + gain < -margin    it is not expected to come among the best (forecast.py)
    it is not flat, or trials as flat have been seen to stay so

t is the quantile 1 - alpha / (m r) of Student's t with n - 1 degrees of freedom, m = looks // 2.

Flat trials. The start is the mean rate of the untrained model, or, if a study has not kept it, the lowest of any
trial's first evaluation. A trial has risen if the mean of its last two evaluations is above the start by more than
`share` of the way to the contender's score. Whether a flat one will rise, its curve cannot tell, but the study can. It
is pruned if at least `precedents` finished trials were as flat at that look, and none of them gained more later than
`jump` of what separates this one from the contender. After four that stayed flat, the next one stays flat with a
chance of 5/6 (Laplace's rule of succession).

Fallen trials. A trial has fallen if it is below the start, problem by problem, at both of its last two evaluations:
U(against the start; t) < 0, with r = 1 in t. Its own curve tells what it will do, so it is no flat one: the forecast
leaves it where it is while it falls, and spares it while it climbs out of a dip. It is credited with what finished
trials that had fallen at that look gained late.

What the error refers to. Looking at every evaluation, at each of the best, would find some difference by luck in the
end. Of two consecutive evaluations one has an even number, so a trial that is behind another was so at one of the m
even looks, and these m r tests share the error `alpha` of a whole trial (Bonferroni). A trial whose chances on each
problem equal those of the best at every step is thus taken to be behind with a probability of at most `alpha`, as far
as the mean of n differences is normal; evaluations need not be independent. This covers the choice of the problems and
the draws of the answers, and nothing else. It does not cover training: the same settings under another training seed
have other chances and may truly be behind, by how much a study cannot know, since it trains no settings twice.

The other constants were chosen by the simulation in benchmarks/pruners.py.

Why not `optuna.pruners.WilcoxonPruner`: it pairs a trial's values with the best trial's step by step, as if a step
were an instance of a problem. Here a step is an evaluation of all problems at one moment of training. Its test would
weigh early steps like late ones, and never use the problems, which are what pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import optuna
from numpy.typing import ArrayLike, NDArray
from optuna.trial import FrozenTrial, TrialState

from grpo_mlflow.algorithm.statistics import t_quantile
from grpo_mlflow.search import decay, forecast, records

Array = NDArray[np.float64]
UNTRAINED = "untrained"  # in a trial's records: the success rates of all problems before its training


def rates_key(step: int) -> str:
    """Return the key in a trial's records of the success rates of all problems at a step."""
    return f"rates:{step}"


@dataclass(frozen=True, slots=True)
class _Curve:
    """A trial's evaluations: their steps, ascending, and the success rates of all problems there, (looks, problems)."""

    number: int
    score: float | None  # None unless it has finished
    steps: list[int]
    rates: Array

    def at(self, step: int) -> Array:
        found: Array = self.rates[self.steps.index(step)]
        return found

    def until(self, step: int) -> Array:
        return self.rates[: sum(each <= step for each in self.steps)]


class PairedPruner(optuna.pruners.BasePruner):
    """Prunes a trial that is behind one of the best, problem by problem, and is not expected to come among them.

    Args:
        looks: how many evaluations a trial has whose records hold no learning rates, one for each (decay.py).
        objective: what a trial's score is made of: its last evaluation, the mean of its last, or its best one.
        objective_window: how many of the last evaluations `mean` takes.
        margin: how much worse, in pass@k, a trial may be and still go on.
        alpha: chance that a trial is taken to be behind one of the best that it equals in its chances at every step.
        top: share of the trials that count as the best.
        doubt: standard errors by which a trial must miss the contender's score.
        share: share of the way from the start to the contender's score above which a trial has risen.
        precedents: how many finished trials must have been as flat before a flat one is pruned.
        jump: share of the distance to the contender by which none of them may have risen later.

    Raises:
        ValueError: an option is outside its range.
    """

    def __init__(
        self,
        looks: int,
        *,
        objective: Literal["last", "mean", "best"] = "last",
        objective_window: int = 1,
        margin: float = 0.0,
        alpha: float = 0.05,
        top: float = 0.1,
        doubt: float = 0.5,
        share: float = 0.16,
        precedents: int = 4,
        jump: float = 0.25,
    ) -> None:
        _require("alpha", alpha, 0 < alpha < 1, "above 0 and below 1")
        for name, value in (("top", top), ("share", share), ("jump", jump)):
            _require(name, value, 0 <= value <= 1, "0 to 1")
        for name, value in (("margin", margin), ("doubt", doubt), ("precedents", precedents)):
            _require(name, value, 0 <= value < math.inf, "0 or more")
        self._looks = looks
        self._scored = {"last": 1, "mean": objective_window, "best": 0}[objective]
        self._margin, self._alpha, self._top, self._doubt = margin, alpha, top, doubt
        self._share, self._precedents, self._jump = share, precedents, jump

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        own, learning_rates = _curve(trial), records.kept_at(trial, decay.KEY) or [1.0] * self._looks
        first = decay.first_look(learning_rates)
        if own is None or first is None or len(own.steps) < first:
            return False
        ended = _ended(study, own)
        able = [one for one in ended if one.score is not None and set(own.steps[-2:]) <= set(one.steps)]
        if not able:
            return False
        able.sort(key=lambda one: (-(one.score or 0.0), one.number))
        best = able[: max(1, math.ceil(self._top * (len(ended) + 1) - 1e-9))]  # ten times .1 is one
        start = np.asarray(records.kept_at(trial, UNTRAINED) or (), dtype=np.float64)
        if len(start) != own.rates.shape[1]:
            start = min((one.rates[0] for one in (*ended, own) if one.steps), key=np.mean)
        looks, goal = len(learning_rates), self._score(best[-1])
        return self._is_behind(own, best, looks) and self._is_out_of_reach(own, looks, start, goal, able)

    def upper_bound(self, rates: ArrayLike, others: ArrayLike, tests: int) -> float:
        """Return the upper confidence bound of the mean difference in one of `tests` tests that share the error."""
        return _bound(np.subtract(rates, others), t_quantile(1 - self._alpha / tests, len(np.asarray(rates)) - 1))

    def _is_behind(self, own: _Curve, best: Sequence[_Curve], looks: int) -> bool:
        """Return whether the trial is behind one of the best at both of its last two evaluations."""
        tests = max(1, looks // 2) * len(best)
        return any(
            all(self.upper_bound(own.at(step), one.at(step), tests) < -self._margin for step in own.steps[-2:])
            for one in best
        )

    def _is_out_of_reach(self, own: _Curve, looks: int, start: Array, goal: Array, able: Sequence[_Curve]) -> bool:
        """Return whether the trial, by its curve and by trials like it, will not come to the contender's rates."""
        step, zero = own.steps[-1], forecast.logit(start)
        high = float(start.mean() + self._share * (goal.mean() - start.mean()))
        kind = self._kind(own, step, looks, start, high)
        like = [one for one in able if self._kind(one, step, looks, start, high) == kind]
        late = 0.0
        if kind != "flat":
            late = max((forecast.late(one.rates, len(one.until(step)), zero) for one in like), default=0.0)
        elif not self._stays_flat(own, goal, like):
            return False
        reached = _bound(own.rates[-1] - goal, self._doubt) + forecast.gain(own.rates, looks, zero, late)
        if not self._scored:  # its best evaluation counts, even if it is past
            reached = max(reached, _bound(self._score(own) - goal, self._doubt))
        return reached < -self._margin

    def _kind(
        self, curve: _Curve, step: int, looks: int, start: Array, high: float
    ) -> Literal["risen", "fallen", "flat"]:
        """Return what a trial had done by this step, from its last two evaluations; above `high` it has risen."""
        last = curve.until(step)[-2:]
        if float(last.mean()) > high:
            return "risen"
        fallen = all(self.upper_bound(rates, start, max(1, looks // 2)) < 0 for rates in last)
        return "fallen" if fallen else "flat"

    def _stays_flat(self, own: _Curve, goal: Array, like: Sequence[_Curve]) -> bool:
        """Return whether enough trials were as flat as this one, and none of them rose far later."""
        step = own.steps[-1]
        far = self._jump * float((goal - own.at(step)).mean())
        rises = [float((self._score(one) - one.at(step)).mean()) for one in like]
        return len(rises) >= self._precedents and all(rise <= far for rise in rises)

    def _score(self, curve: _Curve) -> Array:
        """Return the success rates that make up a trial's score, (problems,)."""
        if not self._scored:
            return max(curve.rates, key=lambda rates: float(rates.mean()))
        found: Array = curve.rates[-self._scored :].mean(axis=0)
        return found


def _require(name: str, value: float, holds: bool, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} = {value}; allowed: {allowed}")


def _bound(differences: Array, quantile: float) -> float:
    return float(differences.mean()) + quantile * forecast.standard_error(differences)


def _curve(trial: FrozenTrial) -> _Curve | None:
    """Return the evaluations that were reported and have rates; None if they are of different numbers of problems.

    An earlier version counted problems that repeat, too.
    """
    kept = {step: records.kept_at(trial, rates_key(step)) for step in sorted(trial.intermediate_values)}
    kept = {step: rates for step, rates in kept.items() if rates is not None}
    if len({len(rates) for rates in kept.values()}) > 1:
        return None
    score = trial.value if trial.state == TrialState.COMPLETE else None
    return _Curve(trial.number, score, list(kept), np.array(list(kept.values()), dtype=np.float64))


def _ended(study: optuna.Study, own: _Curve) -> list[_Curve]:
    """Return the trials that finished or were pruned, but for those over other problems than this one."""
    ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    curves = [curve for curve in map(_curve, ended) if curve is not None]
    return [curve for curve in curves if not curve.steps or curve.rates.shape[1:] == own.rates.shape[1:]]
