"""A search space: the settings that vary, what each may be, and which of them depend on others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from grpo_mlflow.config import ENTRIES, Config, Resolved, flatten, overlay
from grpo_mlflow.errors import ConfigError

Distribution = CategoricalDistribution | FloatDistribution | IntDistribution


@dataclass(frozen=True, slots=True)
class Dimension:
    """One setting that varies; `when` maps other settings to the values that switch it on."""

    key: str
    distribution: Distribution
    when: Mapping[str, tuple[Any, ...]]

    def __str__(self) -> str:
        condition = " and ".join(f"{key} = {_either(allowed)}" for key, allowed in self.when.items())
        return f"{self.key} {_in_words(self.distribution)}{f' where {condition}' if condition else ''}"

    def is_on(self, values: Mapping[str, Any]) -> bool:
        """Return whether the settings drawn so far switch it on."""
        return all(key in values and values[key] in allowed for key, allowed in self.when.items())


def values_of(config: Config) -> dict[str, Any]:
    """Return what a config says of each key that a space may have."""
    flat = flatten(config.model_dump(mode="json"))
    for name, entry in config.data.rewards.items():
        weight = entry.get("weight", 1.0) if isinstance(entry, Mapping) else entry
        called = name.rpartition(":")[2]
        flat[f"{ENTRIES}{called}"] = config.train.reward_weights.get(called, weight)
    return flat


@dataclass(frozen=True, slots=True)
class Space:
    """All dimensions, each after those that switch it on."""

    dimensions: tuple[Dimension, ...]

    def __str__(self) -> str:
        return ", ".join(map(str, self.dimensions))

    def suggest(self, trial: optuna.Trial, only: Collection[str] | None = None) -> dict[str, Any]:
        """Draw a value for every dimension that is switched on, or of those for `only` some."""
        values: dict[str, Any] = {}
        for dimension in self.dimensions:
            if dimension.is_on(values) and (only is None or dimension.key in only):
                values[dimension.key] = _draw(trial, dimension)
        return values

    def all_settings(self, most: int) -> list[dict[str, Any]] | None:
        """Return every combination of settings; None if there are more than `most`, as of a continuous range."""
        found: list[dict[str, Any]] = [{}]
        for dimension in self.dimensions:
            count = _count(dimension.distribution)
            if count is None or count > most:
                return None
            values = _values(dimension.distribution, count)
            found = [
                {**settings, dimension.key: value} if dimension.is_on(settings) else settings
                for settings in found
                for value in (values if dimension.is_on(settings) else values[:1])
            ]
            if len(found) > most:
                return None
        return found

    def own(self, config: Config) -> dict[str, Any] | None:
        """Return the settings that the config itself has for this space; None if the space does not hold them all."""
        flat = values_of(config)
        values: dict[str, Any] = {}
        for dimension in self.dimensions:
            if dimension.is_on(values):
                value = flat[dimension.key]
                if not holds(dimension.distribution, value):
                    return None
                values[dimension.key] = value
        return values

    def require_grid(self, base: Resolved) -> None:
        """Raise ConfigError if there is no grid, or if the config refuses one of its combinations."""
        grid = self.grid()
        for values in itertools.product(*grid.values()):
            overlay(base, dict(zip(grid, values, strict=True)), "space")

    def grid(self) -> dict[str, list[Any]]:
        """Return every value of each dimension, for a grid search.

        Raises:
            ConfigError: a dimension has no finite list of values, or is conditional.
        """
        return {dimension.key: _grid_values(dimension) for dimension in self.dimensions}


def holds(distribution: Distribution, value: Any) -> bool:
    """Return whether a value could have been drawn."""
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    if not distribution.low <= value <= distribution.high:
        return False
    steps = (value - distribution.low) / distribution.step if distribution.step else 0.0
    return math.isclose(steps, round(steps), abs_tol=1e-9)


def _in_words(distribution: Distribution) -> str:
    if isinstance(distribution, CategoricalDistribution):
        return _either(distribution.choices)
    scale = " (logarithmic)" if distribution.log else ""
    step = f" in steps of {distribution.step:g}" if distribution.step not in (None, 1) else ""
    return f"{distribution.low:g} to {distribution.high:g}{step}{scale}"


def _either(values: Sequence[Any]) -> str:
    return " | ".join(map(str, values))


def _draw(trial: optuna.Trial, dimension: Dimension) -> Any:
    key, distribution = dimension.key, dimension.distribution
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(key, distribution.choices)
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(key, distribution.low, distribution.high, step=distribution.step, log=distribution.log)
    return trial.suggest_float(key, distribution.low, distribution.high, step=distribution.step, log=distribution.log)


def _grid_values(dimension: Dimension) -> list[Any]:
    distribution = dimension.distribution
    if dimension.when:
        raise ConfigError(f"search.space: {dimension.key}: search.sampler = grid; allowed: settings without `when`")
    count = _count(distribution)
    if count is None or getattr(distribution, "log", False):
        raise ConfigError(f"search.space: {dimension.key}: search.sampler = grid; allowed: a list of values, or a step")
    return _values(distribution, count)


def _count(distribution: Distribution) -> int | None:
    """Return how many values there are; None of a continuous range."""
    if isinstance(distribution, CategoricalDistribution):
        return len(distribution.choices)
    if distribution.step is None:
        return None
    return math.floor((distribution.high - distribution.low) / distribution.step + 1e-9) + 1


def _values(distribution: Distribution, count: int) -> list[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, IntDistribution):
        return [distribution.low + i * distribution.step for i in range(count)]
    low, step = Decimal(str(distribution.low)), Decimal(str(distribution.step))  # .8 and not .7999999999999999
    return [float(low + i * step) for i in range(count)]
