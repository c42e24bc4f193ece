"""What a trial may still gain: its learning curve continued to the end of the run.

Rates are the success rates of n problems at the evaluations so far, (looks, n). l is the logit of their mean, in which
learning curves are straighter than in rates. A curve is continued as a power law of the training done, from where the
untrained model stood, l0, through its middle and its last look k to the last one, K:

    rise = (l(k) - l0) ((K / k)^g - 1),    (k / h)^g = (l(k) - l0) / (l(h) - l0),    h = k // 2,    g at most 1

For a curve in proportion to t^g this is exact, for one that saturates it is too much. l(k) is the mean of the last two
logits, which has less noise and stands half a look earlier. A curve that has not risen since its middle stays where it
is. One that has just begun to climb, beyond the noise and more steeply than on the mean so far, is also continued as a
straight line, and the higher of both counts.

What curves gain beyond this, other trials tell: `late` is a part of what a finished trial gained beyond its own
continuation from the same look (as split conformal prediction takes its errors from other cases, Lei et al. 2018, arXiv
1604.04173). The constants were chosen by the simulation in benchmarks/pruners.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
_WINDOW = 0.1  # share of the run over which a sudden climb is measured
_BEYOND_NOISE = 2.5  # standard errors that make it more than noise
_TRUST = 0.7  # share of what another trial gained late that this one may gain, too
_RESERVE = 0.08  # what any trial may gain in a whole run beyond its forecast, in pass@k


def standard_error(differences: ArrayLike) -> float:
    """Return the standard error of the mean."""
    values = np.asarray(differences, dtype=np.float64)
    return float(values.std(ddof=1)) / math.sqrt(len(values))


def logit(rates: ArrayLike) -> float:
    """Return the logit of the mean rate; half a success and half a failure are added, so it is finite (Cox 1970)."""
    values = np.asarray(rates, dtype=np.float64)
    return math.log((float(values.sum()) + 0.5) / (float((1 - values).sum()) + 0.5))


def gain(rates: Array, looks: int, start: float, late: float = 0.0) -> float:
    """Return what a trial may still gain, in pass@k.

    Args:
        rates: its success rates so far, (looks so far, problems).
        looks: how many looks it has in all.
        start: the logit of the untrained model's rates.
        late: what is added to the rise of its logit (see `late`).
    """
    now = logit(rates[-1])
    return _expit(now + rise(rates, looks, start) + late) - _expit(now) + _RESERVE * (looks - len(rates)) / looks


def late(rates: Array, made: int, start: float) -> float:
    """Return a part of how far a finished trial's logit ended above its forecast of `made` looks; 0 if it did not."""
    logits = [logit(each) for each in rates]
    return max(0.0, _TRUST * (_level(logits) - _level(logits[:made]) - rise(rates[:made], len(rates), start)))


def rise(rates: Array, looks: int, start: float) -> float:
    """Return how far the logit is expected to rise until the last look, at least 0."""
    if len(rates) < 2:
        return 0.0
    logits = [logit(each) for each in rates]
    return max(_power_law(logits, looks, start), _sudden_slope(rates, logits, looks) * (looks - len(rates)))


def _power_law(logits: Sequence[float], looks: int, start: float) -> float:
    """Return the rise by a power law from the start through the middle and the last look."""
    made, half = len(logits), len(logits) // 2
    above, since = _level(logits) - start, _level(logits) - _level(logits[:half])
    if since <= 0:
        return 0.0
    passed, left = _stands(made) / _stands(half), looks / _stands(made)
    # A middle at the start, or below it, makes for the steepest curve.
    exponent = 1.0 if above <= since else min(1.0, -math.log(1 - since / above) / math.log(passed))
    return max(above, since) * (math.pow(left, exponent) - 1)


def _sudden_slope(rates: Array, logits: Sequence[float], looks: int) -> float:
    """Return the slope of the last looks, in logits per look, if the curve has just begun to climb; else 0."""
    back = min(max(1, round(_WINDOW * looks)), len(logits) - 1)
    slope, mean = (logits[-1] - logits[-1 - back]) / back, (logits[-1] - logits[0]) / (len(logits) - 1)
    climbed = rates[-1] - rates[-1 - back]
    return slope if slope > mean and climbed.mean() > _BEYOND_NOISE * standard_error(climbed) else 0.0


def _level(logits: Sequence[float]) -> float:
    """Return the mean of the last two logits."""
    return sum(logits[-2:]) / len(logits[-2:])


def _stands(made: int) -> float:
    """Return the look at which `_level` of so many logits stands."""
    return made - 0.5 if made > 1 else 1.0


def _expit(value: float) -> float:
    return 1 / (1 + math.exp(-min(max(value, -30.0), 30.0)))
