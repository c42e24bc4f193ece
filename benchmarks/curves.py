"""Simulated learning curves, by family: what a pruner must tell apart.

Trial i has a skill s_i(t) at evaluation t of a run (t runs from 1 / looks to 1) and solves problem j with probability

    p_ij(t) = sigmoid(s_i(t) - b_j + e_ij),   b_j ~ N(0, 1.5^2),   e_ij ~ N(0, 0.5^2)

b_j is how hard the problem is, for all trials; e_ij is what this trial happens to be good at. If a family says no more,

    s_i(t) = start + (final_i - start) * f_i(t) + w_i(t),   f_i(1) = 1,   start = -1.2,

final_i comes from a spread (pass@1 of .3 to .9 at the end) and the family gives f. w_i is training noise, an
autoregressive walk with standard deviation .08 (up to two points of pass@1).

Families that the pruner `paired` was tuned on:

    slow        60% rise as 1 - exp(-t / tau), tau .05 to .5; 25% start slowly (a logistic curve with its middle at .25
                to .6); 15% rise fast and fall again by up to a half
    slow, early the same with the middle at .2 to .45
    exponential all rise as 1 - exp(-t / tau), tau .05 to 1
    swap        the same, and who ends higher has the longer tau (they correlate)
    step        30% stay flat and then rise within a fifth of the run, with the middle at .4 to .7
    linear      lr decays linearly: exponential progress less c_i * lr(t), c_i up to 1.2, more for those that end higher

Families that were looked at, with other seeds, when its rules and constants were chosen:

    power       all rise as a power law, 1 - (1 + t / a)^-b, a from .02 to .3, b from .3 to 1.5
    crossing    t^g with g from .15 to 1.2: who starts slowly ends higher (they correlate)
    jump        40% stay flat until .3 to .9 and jump to their end within a twentieth of the run; the others: power laws
    dip         a half first falls, by .3 to 1.2 with the trough at .08 to .3, then rises as a power law
    collapse    power laws, from which a fifth falls for good, by 4 to 8 as 1 - exp(-t / tau), tau .1 to .5
    hard        start -5.5 (pass@1 .018), ends above it by an exponential of mean 1.3: few rise; t^g, g .5 to 2

Families that had no part in it:

    saturated   start 4 (pass@1 .95), ends of 3.5 to 7 (.93 to .99), power laws
    cosine      lr decays by a cosine: a power law in the lr spent so far, less c_i * lr(t), c_i up to 2, more for those
                that end higher
    mixed       as `cosine`, and half of the trials have the constant lr: there the penalty stays
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from grpo_mlflow.algorithm.names import Schedule
from grpo_mlflow.algorithm.schedules import learning_rate

Array = NDArray[np.float64]
_HARDNESS, _TASTE, _WALK = 1.5, 0.5, 0.08
_START, _SATURATED, _HARD = -1.2, 4.0, -5.5


@dataclass(frozen=True, slots=True)
class Curves:
    """The skill of each trial at each evaluation, (trials, looks), its `train.lr_schedule`, and the untrained skill."""

    skill: Array
    schedules: tuple[Schedule, ...]
    start: float = _START


@dataclass(frozen=True, slots=True)
class Study:
    """Measured success rates (trials, looks, problems), the true final score of each trial, and its schedule.

    And those of the untrained model, (problems,).
    """

    rates: Array
    truth: Array
    schedules: tuple[Schedule, ...]
    untrained: Array


def _column(rng: np.random.Generator, low: float, high: float, trials: int) -> Array:
    return rng.uniform(low, high, (trials, 1))


def _ends(rng: np.random.Generator, trials: int) -> Array:
    found: Array = (rng.uniform(-0.9, 2.2, trials) - rng.exponential(0.35, trials))[:, None]
    return found


def _unit(shape: Array) -> Array:
    """Scale curves to end at 1."""
    return shape / shape[:, -1:]


def _logistic(t: Array, middle: Array, width: float) -> Array:
    return 1 / (1 + np.exp(-(t - middle) / width)) - 1 / (1 + np.exp(middle / width))


def _power_law(rng: np.random.Generator, t: Array, trials: int) -> Array:
    scale, exponent = np.exp(_column(rng, math.log(0.02), math.log(0.3), trials)), _column(rng, 0.3, 1.5, trials)
    return _unit(1 - (1 + t / scale) ** -exponent)


def _power(rng: np.random.Generator, t: Array, trials: int) -> Array:
    return _START + (_ends(rng, trials) - _START) * _power_law(rng, t, trials)


def _slow(rng: np.random.Generator, t: Array, trials: int, low: float = 0.25, high: float = 0.6) -> Array:
    rise = 1 - np.exp(-t / _column(rng, 0.05, 0.5, trials))
    late = _logistic(t, _column(rng, low, high, trials), 0.08)
    fall = 1 + _column(rng, 0, 1, trials) * np.clip(1 - t, 0, 0.5) * 2
    kind = rng.choice(3, size=(trials, 1), p=[0.6, 0.25, 0.15])
    shape = _unit(np.where(kind == 1, late, rise))
    return _START + (_ends(rng, trials) - _START) * np.where(kind == 2, shape * fall, shape)


def _exponential(rng: np.random.Generator, t: Array, trials: int) -> Array:
    shape = _unit(1 - np.exp(-t / _column(rng, 0.05, 1, trials)))
    return _START + (_ends(rng, trials) - _START) * shape


def _places(rng: np.random.Generator, ends: Array, noise: float) -> Array:
    """Rank trials by their end and noise, from 0 to 1."""
    return np.argsort(np.argsort(ends + rng.normal(0, noise, ends.shape), axis=0), axis=0) / max(1, len(ends) - 1)


def _swap(rng: np.random.Generator, t: Array, trials: int) -> Array:
    ends = _ends(rng, trials)
    place = _places(rng, ends, 0.9)
    return _START + (ends - _START) * _unit(1 - np.exp(-t / (0.05 + 0.95 * place**2)))


def _step(rng: np.random.Generator, t: Array, trials: int) -> Array:
    rise = _unit(1 - np.exp(-t / _column(rng, 0.05, 0.5, trials)))
    late = _unit(_logistic(t, _column(rng, 0.4, 0.7, trials), 0.04))
    return _START + (_ends(rng, trials) - _START) * np.where(_column(rng, 0, 1, trials) < 0.3, late, rise)


def _crossing(rng: np.random.Generator, t: Array, trials: int) -> Array:
    ends = _ends(rng, trials)
    return _START + (ends - _START) * t ** (0.15 + 1.05 * _places(rng, ends, 1.1))


def _dip(rng: np.random.Generator, t: Array, trials: int) -> Array:
    trough = _column(rng, 0.08, 0.3, trials)
    dip = _column(rng, 0.3, 1.2, trials) * (t / trough) * np.exp(1 - t / trough)
    dip = np.where(_column(rng, 0, 1, trials) < 0.5, dip, 0.0)
    return _START + (_ends(rng, trials) - _START) * _power_law(rng, t, trials) - dip


def _collapse(rng: np.random.Generator, t: Array, trials: int) -> Array:
    fall = _column(rng, 4, 8, trials) * (1 - np.exp(-t / _column(rng, 0.1, 0.5, trials)))
    return _power(rng, t, trials) - np.where(_column(rng, 0, 1, trials) < 0.2, fall, 0.0)


def _saturated(rng: np.random.Generator, t: Array, trials: int) -> Array:
    return _SATURATED + (_column(rng, 3.5, 7, trials) - _SATURATED) * _power_law(rng, t, trials)


def _hard(rng: np.random.Generator, t: Array, trials: int) -> Array:
    return _HARD + rng.exponential(1.3, (trials, 1)) * t ** _column(rng, 0.5, 2, trials)


def _jump(rng: np.random.Generator, t: Array, trials: int) -> Array:
    late = _unit(_logistic(t, _column(rng, 0.3, 0.9, trials), 0.01))
    jumps = _column(rng, 0, 1, trials) < 0.4
    return _START + (_ends(rng, trials) - _START) * np.where(jumps, late, _power_law(rng, t, trials))


def _decayed(rng: np.random.Generator, lr: Array, trials: int, most: float, shape: Callable[[Array], Array]) -> Array:
    """Progress is a function of the learning rate spent so far; noise in proportion to lr costs skill."""
    spent = np.cumsum(lr, axis=1) / lr.sum(axis=1, keepdims=True)
    ends = _ends(rng, trials)
    return _START + (ends - _START) * shape(spent) - most * _places(rng, ends, 0.9) * lr


def learning_rates(schedule: Schedule, looks: int) -> Array:
    """The learning rate at the last optimizer step before each evaluation, over its peak."""
    return np.array([learning_rate(look, looks, 1.0, 0, schedule) for look in range(looks)])


def draw(rng: np.random.Generator, family: str, trials: int, looks: int) -> Curves:
    """Draw the trials of a study of this family, without and with training noise."""
    t = np.arange(1, looks + 1)[None, :] / looks
    schedules: tuple[Schedule, ...] = ("constant",) * trials
    if family in ("linear", "cosine", "mixed"):
        decay: Schedule = "linear" if family == "linear" else "cosine"
        constant = rng.uniform(size=trials) < (0.5 if family == "mixed" else 0.0)
        schedules = tuple("constant" if one else decay for one in constant)
        lr = np.stack([learning_rates(schedule, looks) for schedule in schedules])
        if family == "linear":
            skill = _decayed(rng, lr, trials, 1.2, lambda x: _unit(1 - np.exp(-x / _column(rng, 0.05, 1, trials))))
        else:
            skill = _decayed(rng, lr, trials, 2.0, lambda x: _power_law(rng, x, trials))
    elif family == "slow, early":
        skill = _slow(rng, t, trials, 0.2, 0.45)
    else:
        skill = _SHAPES[family](rng, t, trials)
    start = {"saturated": _SATURATED, "hard": _HARD}.get(family, _START)
    return Curves(skill + walk(rng, trials, looks), schedules, start)


_SHAPES: dict[str, Callable[[np.random.Generator, Array, int], Array]] = {
    "slow": _slow,
    "exponential": _exponential,
    "swap": _swap,
    "step": _step,
    "power": _power,
    "crossing": _crossing,
    "dip": _dip,
    "collapse": _collapse,
    "saturated": _saturated,
    "hard": _hard,
    "jump": _jump,
}
TUNED = ("slow", "slow, early", "exponential", "swap", "step", "linear")
SEEN = ("power", "crossing", "jump", "dip", "collapse", "hard")
KEPT_APART = ("saturated", "cosine", "mixed")


def walk(rng: np.random.Generator, trials: int, looks: int) -> Array:
    """Draw training noise: an autoregressive walk for each trial, (trials, looks)."""
    found = np.zeros((trials, looks))
    for look in range(looks):
        before = found[:, look - 1] if look else np.zeros(trials)
        found[:, look] = 0.8 * before + rng.normal(0, _WALK * 0.6, trials)
    return found


def tastes(rng: np.random.Generator, trials: int, problems: int) -> Array:
    """Draw what each trial happens to be good at, (trials, problems)."""
    return rng.normal(0, _TASTE, (trials, problems))


def measure(
    rng: np.random.Generator, curves: Curves, problems: int, replicates: int, liking: Array | None = None
) -> Study:
    """Evaluate every trial at every look on the same problems; its tastes (trials, problems) may be given."""
    hardness = rng.normal(0, _HARDNESS, problems)
    liking = tastes(rng, len(curves.skill), problems) if liking is None else liking
    chance = 1 / (1 + np.exp(-(curves.skill[:, :, None] - hardness + liking[:, None, :])))
    rates = rng.binomial(replicates, chance) / replicates
    untrained = rng.spawn(1)[0].binomial(replicates, 1 / (1 + np.exp(hardness - curves.start))) / replicates
    return Study(rates, truth(curves.skill[:, -1]), curves.schedules, untrained)


def truth(final: Array) -> Array:
    """Return the mean success rate at each final skill over 20,000 problems."""
    spread = np.random.default_rng(0).normal(0, np.hypot(_HARDNESS, _TASTE), 20_000)
    return np.array([(1 / (1 + np.exp(-(one + spread)))).mean() for one in final])
