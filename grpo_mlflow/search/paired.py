"""A pruner that compares trials problem by problem.

All trials are evaluated on the same problems with the same random draws, so the difference between two trials at the
same step is a mean of paired differences d_i = rate_i(trial) - rate_i(incumbent): its spread does not contain that
between easy and hard problems, which is most of the noise of pass@k (Miller 2024, arXiv 2411.00640, section 4.2).

Rivals are the best finished trials (two of them, so that one lucky curve does not rule). With the upper bound

    U(rival rates) = mean(d) + t(1 - alpha / looks) * sd(d) / sqrt(n)

a trial is pruned when at its last two evaluations, against every rival, both

    U(the rival at the same step) < -margin             it is behind where the rival was, beyond doubt
    U(the rival at its end) + credit < -margin          and will not catch up

where credit = gain * (looks left / window) * max(0, mean rate now - mean rate `window` evaluations ago): a trial that
still rises is taken to go on rising at `gain` of its present slope. Nothing is pruned in the first `warm_up` of it.

Looking at every evaluation would find some difference by luck in the end; the error `alpha` of a whole trial is
therefore shared by its `looks` evaluations (Bonferroni), so that of two equal settings one is pruned in at most a share
`alpha` of studies. The other constants were chosen by the simulation in benchmarks/pruners.py.

Left out: what another training seed would change. It shifts a trial as a whole, and only retraining can measure it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from grpo_mlflow.statistics import mean, t_quantile


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
        warm_up: share of a trial's evaluations before which it is never pruned.
        window: share of the evaluations over which its slope is measured.
        gain: share of that slope that it is expected to keep.
    """

    def __init__(
        self,
        looks: int,
        margin: float = 0.0,
        alpha: float = 0.05,
        rivals: int = 2,
        warm_up: float = 0.2,
        window: float = 0.1,
        gain: float = 0.75,
    ) -> None:
        self._looks, self._margin, self._alpha = max(1, looks), margin, alpha
        self._rivals, self._warm_up, self._gain = rivals, warm_up, gain
        self._window = max(1, round(window * looks))

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        steps = sorted(trial.intermediate_values)
        if len(steps) < 2 or len(steps) - 1 < self._warm_up * self._looks:
            return False
        finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        able = [t for t in finished if t.value is not None and all(rates_key(s) in t.user_attrs for s in steps[-2:])]
        rivals = sorted(able, key=lambda t: (-(t.value or 0.0), t.number))[: self._rivals]
        if len(rivals) < self._rivals:
            return False
        return all(self._out_of_reach(trial, steps[:seen], rivals) for seen in (len(steps), len(steps) - 1))

    def _out_of_reach(self, trial: FrozenTrial, steps: Sequence[int], rivals: Sequence[FrozenTrial]) -> bool:
        """Return whether every rival is, as seen at the last of `steps`."""
        now = trial.user_attrs[rates_key(steps[-1])]
        credit = self._credit(trial, steps)
        return all(
            self.upper_bound(now, rival.user_attrs[rates_key(steps[-1])]) < -self._margin
            and self.upper_bound(now, rival.user_attrs[rates_key(max(rival.intermediate_values))]) + credit
            < -self._margin
            for rival in rivals
        )

    def _credit(self, trial: FrozenTrial, steps: Sequence[int]) -> float:
        """Return how far the trial may still rise; without bound where its slope cannot be known yet."""
        left, back = self._looks - len(steps), min(self._window, len(steps) - 1)
        if left <= 0:
            return 0.0
        if back == 0:
            return math.inf
        now, before = (mean(trial.user_attrs[rates_key(step)]) for step in (steps[-1], steps[-1 - back]))
        return self._gain * left / back * max(0.0, now - before)

    def upper_bound(self, rates: Sequence[float], incumbent: Sequence[float]) -> float:
        """Return the upper confidence bound of the mean difference at one look."""
        differences = np.asarray(rates, dtype=np.float64) - np.asarray(incumbent, dtype=np.float64)
        n = len(differences)
        error = float(differences.std(ddof=1)) / math.sqrt(n)
        return float(differences.mean()) + t_quantile(1 - self._alpha / self._looks, n - 1) * error
