"""A pruner that compares trials problem by problem.

All trials are evaluated on the same problems with the same random draws, so the difference between two trials at the
same step is a mean of paired differences: its spread does not contain that between easy and hard problems, which is
most of the noise of pass@k (Miller 2024, arXiv 2411.00640, section 4.2). With the paired differences d_i of one
evaluation of n problems, the upper confidence bound of their mean is

    U(d; q) = mean(d) + q * sd(d) / sqrt(n)

The best are the finished trials of rank 1 to r = ceil(top * trials so far); the last of them is the contender. Until
ten trials have begun there is one. With d the trial's success rates at an evaluation minus those of another, it is
pruned if

    its learning rate no longer rises, and has at most `hold` of its peak left to lose
    U(against the contender's score; doubt) + credit < -margin     it will not come among the best
    U(against one of the best at the same step; t) < -margin       at its last two evaluations: it is behind
    it is not flat, or trials as flat have been seen to stay so

t is the quantile 1 - alpha / (m r) of Student's t with n - 1 degrees of freedom, m = looks // 2.

The learning rate. Steps that are too large cost skill until they shrink, so progress comes late where the rate decays
(Smith et al. 2018, arXiv 1711.00489). No curve tells by how much: the pruner waits for the decay, and `first_look`
says until when. A constant rate has no such wait.

Flat trials. The start is the lowest first evaluation of any trial. A trial is flat if the mean of its last two
evaluations is above the start by less than `share` of the way to the contender's score, or by less than `doubt`
standard errors. It may yet rise, or never: its curve cannot tell, but the study can. It is pruned after `patience` of
its looks if at least `precedents` finished trials were as flat at that look and all of them ended flat. After three
that stayed flat, the next one stays flat with a chance of 4/5 (Laplace's rule of succession).

The credit is what the trial may still gain. With l the logit of its mean rate, in which learning curves are straighter
than in rates, l' the slope of l over its last looks, and a its mean slope so far,

    credit = expit(l + rise) - expit(l) + reserve * (looks left) / looks
    rise   = l' * min(looks left, reach * looks made * l' / a)      if l' > 0
    rise   = fall * l' * looks left                                 else, below zero

It is measured over the last `window` looks, which sees a sudden rise, and over the last half of the curve, which has
less noise; the larger rise counts. A curve as steep as ever (l' >= a) keeps its slope for `reach` times what it has
behind it; one that flattens out, for so much less. For a curve 1 - exp(-s / tau) of s looks, a / l' = (exp(x) - 1) / x
with x = s / tau, and the rise that is left is tau * l' = l' * s / x. The credit's reach * l' * s * (l' / a) is more
than that for a / l' from 1.2 to 16.

What the error refers to. Looking at every evaluation, at each of the best, would find some difference by luck in the
end. Of two consecutive evaluations one has an even number: a trial that is behind another was so at one of the m even
looks, and these m r tests share the error `alpha` of a whole trial (Bonferroni). So a trial is taken to be behind one
of the best, though its chances on each problem equal that one's at every step, with a probability of at most `alpha`
(as far as the mean of n differences is normal; evaluations need not be independent). This covers the choice of the
problems and the draws of the answers, and nothing else. It does not cover training: the same settings under another
training seed have other chances and may truly be behind. A study trains no settings twice, so it cannot know by how
much. Such a trial is spared only if it is not out of reach. benchmarks/pruners.py counts both: how often the test
fires, how often one is pruned.

The constants were chosen by the simulation in benchmarks/pruners.py.

Why not `optuna.pruners.WilcoxonPruner`: it pairs a trial's values with the best trial's step by step, as if a step
were an instance of a problem. Here a step is an evaluation of all problems at one moment of training. Its test would
weigh early steps like late ones, and never use the problems, which are what pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import optuna
from numpy.typing import ArrayLike, NDArray
from optuna.trial import FrozenTrial, TrialState

from grpo_mlflow.algorithm.statistics import t_quantile
from grpo_mlflow.search import records

_HOLD = 0.25  # of a cosine's peak, until two thirds of the run
LEAST_LOOKS = 3  # two looks at which a trial is behind, and one before them, which gives a slope
Schedule = Callable[[Mapping[str, Any]], Sequence[float]]


def rates_key(step: int) -> str:
    """Return the key in a trial's records of the success rates of all problems at a step."""
    return f"rates:{step}"


def first_look(learning_rates: Sequence[float], hold: float = _HOLD) -> int | None:
    """Return the first look at which a trial with these learning rates may be pruned; None if it has too few.

    Args:
        learning_rates: the learning rate at each look, over its peak.
        hold: how much of its peak it may still lose.
    """
    for look in range(LEAST_LOOKS, len(learning_rates) + 1):
        now, later = learning_rates[look - 1], learning_rates[look - 1 :]
        if now >= max(later) and now - min(later) <= hold:
            return look
    return None


class PairedPruner(optuna.pruners.BasePruner):
    """Prunes a trial that is behind one of the best, problem by problem, and will not come among them.

    Args:
        looks: how many evaluations a trial has; or the learning rate at each of them, over its peak, as a function of
            the trial's parameters. A number alone stands for a constant learning rate.
        objective: what a trial's score is made of: its last evaluation, the mean of its last, or its best one.
        objective_window: how many of the last evaluations `mean` takes.
        margin: how much worse, in pass@k, a trial may be and still go on.
        alpha: chance that a trial is taken to be behind one of the best that it equals in its chances at every step.
        top: share of the trials that count as the best.
        patience: share of a trial's evaluations up to which a flat one is not pruned.
        precedents: how many finished trials must have been as flat, and have stayed so, before a flat one is pruned.
        share: share of the way from the start to the contender's score up to which a trial is flat.
        doubt: standard errors by which a trial must have risen, or must miss the contender's score.
        window: share of the evaluations over which a sudden rise is measured.
        reach: for how long it keeps its slope, in terms of the looks made.
        fall: share of a falling slope that is expected to go on to the end.
        reserve: what any trial may gain from its first look to its last beyond what its slope says, in pass@k.
        hold: how much of its peak the learning rate may still lose when a trial is pruned.

    Raises:
        ValueError: an option is outside its range.
    """

    def __init__(
        self,
        looks: int | Schedule,
        *,
        objective: Literal["last", "mean", "best"] = "last",
        objective_window: int = 1,
        margin: float = 0.0,
        alpha: float = 0.05,
        top: float = 0.1,
        patience: float = 0.25,
        precedents: int = 3,
        share: float = 0.15,
        doubt: float = 2.5,
        window: float = 0.15,
        reach: float = 4.0,
        fall: float = 0.25,
        reserve: float = 0.03,
        hold: float = _HOLD,
    ) -> None:
        _require("alpha", alpha, 0 < alpha < 1, "above 0 and below 1")
        shares = {"top": top, "patience": patience, "share": share, "window": window, "reserve": reserve, "hold": hold}
        for name, value in shares.items():
            _require(name, value, 0 <= value <= 1, "0 to 1")
        amounts = {"margin": margin, "doubt": doubt, "reach": reach, "fall": fall, "precedents": precedents}
        for name, value in amounts.items():
            _require(name, value, 0 <= value < math.inf, "0 or more")
        self._schedule: Schedule = (lambda _: (1.0,) * looks) if isinstance(looks, int) else looks
        self._scored = {"last": 1, "mean": objective_window, "best": 0}[objective]
        self._margin, self._alpha, self._top = margin, alpha, top
        self._patience, self._precedents, self._share = patience, precedents, share
        self._doubt, self._window = doubt, window
        self._reach, self._fall, self._reserve, self._hold = reach, fall, reserve, hold

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        steps, learning_rates = _steps(trial), self._schedule(trial.params)
        looks, first = len(learning_rates), first_look(learning_rates, self._hold)
        if len(steps) < LEAST_LOOKS or first is None or len(steps) < first:
            return False
        if len(problems := _problems(trial)) != 1:
            return False
        ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        ended = [t for t in ended if _problems(t) <= problems]
        finished = [t for t in ended if t.state == TrialState.COMPLETE and t.value is not None]
        able = [t for t in finished if set(steps[-2:]) <= set(_steps(t))]
        if not able:
            return False
        best = sorted(able, key=lambda t: (-(t.value or 0.0), t.number))
        best = best[: max(1, math.ceil(self._top * (len(ended) + 1) - 1e-9))]  # ten times .1 is one
        goal = self._score(best[-1])
        if not self._is_out_of_reach(trial, looks, goal) or not self._is_behind(trial, best, steps[-2:], looks):
            return False
        start = min((_rates(t, _steps(t)[0]) for t in (*ended, trial) if _steps(t)), key=np.mean)
        if not self._is_flat(trial, steps, start, goal):
            return True
        alike = [t for t in able if self._is_flat(t, [step for step in _steps(t) if step <= steps[-1]], start, goal)]
        stayed = [self._is_flat(t, _steps(t), start, goal) for t in alike]
        return len(steps) > self._patience * looks and len(alike) >= self._precedents and all(stayed)

    def _is_behind(self, trial: FrozenTrial, best: Sequence[FrozenTrial], steps: Sequence[int], looks: int) -> bool:
        """Return whether the trial is behind one of the best at all of these steps."""
        tests = max(1, looks // 2) * len(best)
        return any(
            all(self.upper_bound(_rates(trial, step), _rates(other, step), tests) < -self._margin for step in steps)
            for other in best
        )

    def _is_out_of_reach(self, trial: FrozenTrial, looks: int, goal: NDArray[np.float64]) -> bool:
        bounds = [self._bound(_rates(trial, _steps(trial)[-1]) - goal) + self._credit(trial, looks)]
        if not self._scored:  # its best evaluation counts, also if it is past
            bounds.append(self._bound(self._score(trial) - goal))
        return max(bounds) < -self._margin

    def _bound(self, differences: NDArray[np.float64]) -> float:
        return float(differences.mean()) + self._doubt * _error(differences)

    def _score(self, trial: FrozenTrial) -> NDArray[np.float64]:
        """Return the success rates that make up the trial's score, (problems,)."""
        rates = [_rates(trial, step) for step in _steps(trial)]
        if not self._scored:
            return max(rates, key=lambda each: float(each.mean()))
        found: NDArray[np.float64] = np.mean(rates[-self._scored :], axis=0)
        return found

    def _is_flat(
        self, trial: FrozenTrial, steps: Sequence[int], start: NDArray[np.float64], goal: NDArray[np.float64]
    ) -> bool:
        """Return whether it has not risen, beyond the noise, by `share` of the way from the start to the goal."""
        rise = np.mean([_rates(trial, step) for step in steps[-2:]], axis=0) - start
        return float(rise.mean()) <= max(self._doubt * _error(rise), self._share * float((goal - start).mean()))

    def _credit(self, trial: FrozenTrial, looks: int) -> float:
        """Return how far the trial may still rise; below zero if it falls."""
        logits = [_logit(_rates(trial, step)) for step in _steps(trial)]
        made, left = len(logits), max(0, looks - len(logits))
        spans = {min(made - 1, max(1, round(self._window * looks))), made // 2}
        rise = max(self._rise(logits, span, left) for span in spans)
        return _expit(logits[-1] + rise) - _expit(logits[-1]) + self._reserve * left / looks

    def _rise(self, logits: Sequence[float], span: int, left: int) -> float:
        """Return how far a curve goes on rising (or falling) from its slope over the last `span` looks."""
        made = len(logits)
        slope, mean = (logits[-1] - logits[-1 - span]) / span, (logits[-1] - logits[0]) / (made - 1)
        if slope <= 0:
            return self._fall * slope * left
        return slope * (min(left, self._reach * made * slope / mean) if mean > 0 else left)

    def upper_bound(self, rates: ArrayLike, others: ArrayLike, tests: int) -> float:
        """Return the upper confidence bound of the mean difference in one of `tests` tests that share the error."""
        differences = np.asarray(rates, dtype=np.float64) - np.asarray(others, dtype=np.float64)
        quantile = t_quantile(1 - self._alpha / tests, len(differences) - 1)
        return float(differences.mean()) + quantile * _error(differences)


def _require(name: str, value: float, holds: bool, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} = {value}; allowed: {allowed}")


def _error(differences: NDArray[np.float64]) -> float:
    """Return the standard error of the mean."""
    return float(differences.std(ddof=1)) / math.sqrt(len(differences))


def _logit(rates: NDArray[np.float64]) -> float:
    """Return the logit of the mean rate, with half a success and half a failure added (Cox 1970): it stays finite."""
    successes, failures = float(rates.sum()) + 0.5, float((1 - rates).sum()) + 0.5
    return math.log(successes / failures)


def _expit(logit: float) -> float:
    return 1 / (1 + math.exp(-min(max(logit, -30.0), 30.0)))


def _steps(trial: FrozenTrial) -> list[int]:
    """Return the steps at which the trial reported a value and has rates."""
    return sorted(step for step in trial.intermediate_values if records.kept_at(trial, rates_key(step)))


def _problems(trial: FrozenTrial) -> set[int]:
    """Return how many problems its evaluations had: an earlier version counted those that repeat, too."""
    return {len(_rates(trial, step)) for step in _steps(trial)}


def _rates(trial: FrozenTrial, step: int) -> NDArray[np.float64]:
    return np.asarray(records.kept_at(trial, rates_key(step)), dtype=np.float64)
