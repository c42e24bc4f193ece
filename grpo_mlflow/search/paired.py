"""A pruner that compares trials problem by problem.

All trials are evaluated on the same problems with the same random draws, so the difference between two trials at the
same step is a mean of paired differences: its spread does not contain that between easy and hard problems, which is
most of the noise of pass@k (Miller 2024, arXiv 2411.00640, section 4.2). With the paired differences d_i of one
evaluation of n problems, their confidence bounds are

    U(d), L(d) = mean(d) +- t * sd(d) / sqrt(n),    t: quantile 1 - alpha / m of Student's t, n - 1 degrees of freedom

Rivals are the best finished trials (two of them, so that one lucky curve does not rule). A trial is hopeless at an
evaluation if, with d its success rates now minus those it is compared with,

    U(against the rival at the same step) < -margin             it is behind where each rival was, beyond doubt
    U(against the rival at its end) + credit < -margin          and will not catch up with any
    has moved, or has made more than `patience` of its looks    and is not one that has yet to start

and it is pruned if it is hopeless at its last two evaluations. It has moved if L > 0 or U < 0 for the mean of its last
two evaluations against its first: it has risen (or fallen) and what it is now is the outcome of its training. A flat
trial has shown nothing either way, and may be a slow starter. Further,

    credit = gain * (looks left / window) * max(0, mean rate now - mean rate `window` evaluations ago)

so that a trial that still rises is taken to go on rising at `gain` of its present slope.

Looking at every evaluation would find some difference by luck in the end. Of two consecutive evaluations one has an
even number: a trial that is pruned was behind at one of the m = looks // 2 even looks, and they share the error `alpha`
of a whole trial (Bonferroni). So a trial that is equal to a rival at every step is pruned with a chance of at most
`alpha`, whatever the credit (as far as the mean of n differences is normal; evaluations need not be independent).
That is a bound against a given rival. Rivals are chosen for their scores, so luck makes them look better at their end;
needing two rivals, and the comparison at the same step, work against it. A false `has moved` prunes nothing by itself.

Patience, window and gain were chosen by the simulation in benchmarks/pruners.py.

Left out: what another training seed would change. It shifts a trial as a whole, and only retraining can measure it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import optuna
from numpy.typing import ArrayLike, NDArray
from optuna.trial import FrozenTrial, TrialState

from grpo_mlflow.statistics import t_quantile


def rates_key(step: int) -> str:
    """Return the user attribute that holds the success rates of all problems at a step."""
    return f"rates:{step}"


class PairedPruner(optuna.pruners.BasePruner):
    """Prunes a trial that is behind the best finished ones, problem by problem, and will not catch up.

    Args:
        looks: how many evaluations a trial has.
        margin: how much worse, in pass@k, a trial may be and still go on.
        alpha: chance that a trial equal to a rival is pruned.
        rivals: how many of the best finished trials must all be out of reach.
        patience: share of a trial's evaluations up to which it is not pruned if it has not moved.
        window: share of the evaluations over which its slope is measured.
        gain: share of that slope that it is expected to keep.
    """

    def __init__(
        self,
        looks: int,
        margin: float = 0.0,
        alpha: float = 0.05,
        rivals: int = 2,
        patience: float = 0.4,
        window: float = 0.1,
        gain: float = 0.75,
    ) -> None:
        self._looks, self._margin, self._rivals = max(1, looks), margin, rivals
        self._patience, self._gain = patience, gain
        self._window = max(1, round(window * looks))
        self._level = 1 - alpha / max(1, self._looks // 2)

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        steps = _steps(trial)
        if len(steps) < 3:  # the first of two hopeless evaluations needs one before it, for its slope
            return False
        finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        able = [t for t in finished if t.value is not None and set(steps[-2:]) <= set(_steps(t))]
        rivals = sorted(able, key=lambda t: (-(t.value or 0.0), t.number))[: self._rivals]
        if len(rivals) < self._rivals:
            return False
        return all(self._hopeless(trial, steps[:seen], rivals) for seen in (len(steps), len(steps) - 1))

    def _hopeless(self, trial: FrozenTrial, steps: Sequence[int], rivals: Sequence[FrozenTrial]) -> bool:
        """Return whether the trial was, as seen at the last of `steps`."""
        if len(steps) <= self._patience * self._looks and not self._has_moved(trial, steps):
            return False
        now, credit = _rates(trial, steps[-1]), self._credit(trial, steps)
        return all(
            self.upper_bound(now, _rates(rival, steps[-1])) < -self._margin
            and self.upper_bound(now, _rates(rival, _steps(rival)[-1])) + credit < -self._margin
            for rival in rivals
        )

    def _has_moved(self, trial: FrozenTrial, steps: Sequence[int]) -> bool:
        first, now = _rates(trial, steps[0]), (_rates(trial, steps[-2]) + _rates(trial, steps[-1])) / 2
        return self.upper_bound(now, first) < 0 or self.upper_bound(first, now) < 0  # the latter is L(now - first) > 0

    def _credit(self, trial: FrozenTrial, steps: Sequence[int]) -> float:
        """Return how far the trial may still rise."""
        left, back = max(0, self._looks - len(steps)), min(self._window, len(steps) - 1)
        rise = float((_rates(trial, steps[-1]) - _rates(trial, steps[-1 - back])).mean())
        return self._gain * left / back * max(0.0, rise)

    def upper_bound(self, rates: ArrayLike, others: ArrayLike) -> float:
        """Return the upper confidence bound of the mean difference at one look."""
        differences = np.asarray(rates, dtype=np.float64) - np.asarray(others, dtype=np.float64)
        n = len(differences)
        error = float(differences.std(ddof=1)) / math.sqrt(n)
        return float(differences.mean()) + t_quantile(self._level, n - 1) * error


def _steps(trial: FrozenTrial) -> list[int]:
    """Return the steps at which the trial reported a value and has rates."""
    return sorted(step for step in trial.intermediate_values if rates_key(step) in trial.user_attrs)


def _rates(trial: FrozenTrial, step: int) -> NDArray[np.float64]:
    return np.asarray(trial.user_attrs[rates_key(step)], dtype=np.float64)
