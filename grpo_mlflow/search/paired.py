"""A pruner that compares trials problem by problem.

All trials are evaluated on the same problems with the same random draws, so the difference between two trials at the
same step is a mean of paired differences: its spread does not contain that between easy and hard problems, which is
most of the noise of pass@k (Miller 2024, arXiv 2411.00640, section 4.2). With the paired differences d_i of one
evaluation of n problems, the upper confidence bound of their mean is

    U(d; q) = mean(d) + q * sd(d) / sqrt(n)

The incumbent is the best finished trial. The contender is the finished trial of rank ceil(top * trials so far), the
last one of the best tenth: until ten trials have begun it is the incumbent. With d the trial's success rates at an
evaluation minus those that it is compared with, the trial is pruned if

    U(against the incumbent at the same step; t) < -margin         at its last two evaluations: it is behind
    U(against the contender at its end; doubt) + credit < -margin  it will not come among the best
    it has moved, or has made more than `patience` of its looks    and is not one that has yet to start

t is the quantile 1 - alpha / m of Student's t with n - 1 degrees of freedom. A trial has moved if the mean of its last
two evaluations is `doubt` standard errors from its first (paired again): it has risen (or fallen) and what it is now is
the outcome of its training. A flat trial has shown nothing either way, and may be a slow starter.

The credit is what the trial may still gain. With l the logit of its mean rate, in which learning curves are straighter
than in rates, and l' the slope of l over the last `window` looks,

    credit = expit(l + rise) - expit(l) + reserve * (looks left) / looks
    rise   = gain * l' * min(looks left, reach * looks made * l' / a)      if l' > 0; a = the mean slope of l so far
    rise   = fall * l' * looks left                                        else, below zero

A curve as steep as ever (l' >= a) keeps its slope for `reach` times what it has behind it; one that flattens out, for
so much less. For a curve 1 - exp(-s / tau) of s looks, a / l' = (exp(x) - 1) / x with x = s / tau, and the rise that
is left is tau * l' = l' * s / x. The credit's gain * reach * l' * s * (l' / a) is more than that up to a / l' = 11.

Looking at every evaluation would find some difference by luck in the end. Of two consecutive evaluations one has an
even number: a trial that is pruned was behind at one of the m = looks // 2 even looks, and they share the error `alpha`
of a whole trial (Bonferroni). So a trial that is equal to the incumbent at every step is pruned with a chance of at
most `alpha`, whatever the rest says (as far as the mean of n differences is normal; evaluations need not be
independent). That is a bound against a given trial. The incumbent is chosen for its score, so luck makes it look better
at its end; but the comparison that counts is at the same step, where it was not chosen. `doubt` is no part of this: it
guards against the noise of one evaluation, and is set like the others by what it costs.

Top, patience, window, gain, reach, fall, reserve and doubt were chosen by the simulation in benchmarks/pruners.py.

Left out: what another training seed would change. It shifts a trial as a whole, and only retraining can measure it.

Why not `optuna.pruners.WilcoxonPruner`: it pairs a trial's values with the best trial's step by step, as if a step were
an instance of a problem. Here a step is an evaluation of all problems at one moment of training. Its test would weigh
early steps like late ones, and never use the problems, which are what pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import optuna
from numpy.typing import ArrayLike, NDArray
from optuna.trial import FrozenTrial, TrialState

from grpo_mlflow.algorithm.statistics import t_quantile
from grpo_mlflow.search import records


def rates_key(step: int) -> str:
    """Return the key in a trial's records of the success rates of all problems at a step."""
    return f"rates:{step}"


class PairedPruner(optuna.pruners.BasePruner):
    """Prunes a trial that is behind the best finished one, problem by problem, and will not come among the best.

    Args:
        looks: how many evaluations a trial has.
        margin: how much worse, in pass@k, a trial may be and still go on.
        alpha: chance that a trial equal to the incumbent is pruned.
        top: share of the trials that count as the best.
        patience: share of a trial's evaluations up to which it is not pruned if it has not moved.
        doubt: standard errors by which a trial must have moved, or must miss the contender's end.
        window: share of the evaluations over which its slope is measured.
        gain: by what its slope is multiplied.
        reach: for how long it keeps its slope, in terms of the looks made.
        fall: share of a falling slope that is expected to go on to the end.
        reserve: what any trial may gain from its first look to its last beyond what its slope says, in pass@k.

    Raises:
        ValueError: an option is outside its range.
    """

    def __init__(
        self,
        looks: int,
        *,
        margin: float = 0.0,
        alpha: float = 0.05,
        top: float = 0.1,
        patience: float = 0.35,
        doubt: float = 2.2,
        window: float = 0.1,
        gain: float = 1.5,
        reach: float = 2.0,
        fall: float = 0.25,
        reserve: float = 0.17,
    ) -> None:
        _require("alpha", alpha, 0 < alpha < 1, "above 0 and below 1")
        for name, share in (("top", top), ("patience", patience), ("window", window)):
            _require(name, share, 0 <= share <= 1, "0 to 1")
        for name, value in (("margin", margin), ("doubt", doubt), ("gain", gain), ("reach", reach), ("fall", fall)):
            _require(name, value, 0 <= value < math.inf, "0 or more")
        _require("reserve", reserve, 0 <= reserve <= 1, "0 to 1")
        self._looks, self._margin, self._top = max(1, looks), margin, top
        self._patience, self._doubt = patience, doubt
        self._window = max(1, round(window * looks))
        self._gain, self._reach, self._fall, self._reserve = gain, reach, fall, reserve
        self._level = 1 - alpha / max(1, self._looks // 2)

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        steps = _steps(trial)
        if len(steps) < 3:  # two at which it is behind, and one before them, from which it has moved
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
        rank = max(1, math.ceil(self._top * (len(ended) + 1) - 1e-9))  # ten times .1 is one
        return (
            all(self.upper_bound(_rates(trial, step), _rates(best[0], step)) < -self._margin for step in steps[-2:])
            and (len(steps) > self._patience * self._looks or self._has_moved(trial, steps))
            and self._is_out_of_reach(trial, steps, best[:rank][-1])
        )

    def _is_out_of_reach(self, trial: FrozenTrial, steps: Sequence[int], contender: FrozenTrial) -> bool:
        differences = _rates(trial, steps[-1]) - _rates(contender, _steps(contender)[-1])
        bound = differences.mean() + self._doubt * _error(differences)
        return bool(bound + self._credit(trial, steps) < -self._margin)

    def _has_moved(self, trial: FrozenTrial, steps: Sequence[int]) -> bool:
        differences = (_rates(trial, steps[-2]) + _rates(trial, steps[-1])) / 2 - _rates(trial, steps[0])
        return bool(abs(differences.mean()) > self._doubt * _error(differences))

    def _credit(self, trial: FrozenTrial, steps: Sequence[int]) -> float:
        """Return how far the trial may still rise; below zero if it falls."""
        made, left, back = len(steps), max(0, self._looks - len(steps)), min(self._window, len(steps) - 1)
        first, before, now = (_logit(float(_rates(trial, steps[place]).mean())) for place in (0, -1 - back, -1))
        slope, mean = (now - before) / back, (now - first) / (made - 1)
        if slope > 0:
            lasts = min(left, self._reach * made * slope / mean) if mean > 0 else left
            rise = self._gain * slope * lasts
        else:
            rise = self._fall * slope * left
        return _expit(now + rise) - _expit(now) + self._reserve * left / self._looks

    def upper_bound(self, rates: ArrayLike, others: ArrayLike) -> float:
        """Return the upper confidence bound of the mean difference at one look."""
        differences = np.asarray(rates, dtype=np.float64) - np.asarray(others, dtype=np.float64)
        return float(differences.mean()) + t_quantile(self._level, len(differences) - 1) * _error(differences)


def _require(name: str, value: float, holds: bool, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} = {value}; allowed: {allowed}")


def _error(differences: NDArray[np.float64]) -> float:
    """Return the standard error of the mean."""
    return float(differences.std(ddof=1)) / math.sqrt(len(differences))


def _logit(rate: float) -> float:
    inside = min(max(rate, 0.02), 0.98)  # beyond, an answer more or less would be a leap
    return math.log(inside / (1 - inside))


def _expit(logit: float) -> float:
    return 1 / (1 + math.exp(-min(max(logit, -6.0), 6.0)))


def _steps(trial: FrozenTrial) -> list[int]:
    """Return the steps at which the trial reported a value and has rates."""
    return sorted(step for step in trial.intermediate_values if records.kept_at(trial, rates_key(step)))


def _problems(trial: FrozenTrial) -> set[int]:
    """Return how many problems its evaluations had: an earlier version counted those that repeat, too."""
    return {len(_rates(trial, step)) for step in _steps(trial)}


def _rates(trial: FrozenTrial, step: int) -> NDArray[np.float64]:
    return np.asarray(records.kept_at(trial, rates_key(step)), dtype=np.float64)
