"""Spaces as people write them: YAML, or one line.

    train.lr: {low: 1.0e-4, high: 1.0e-3, log: true}          # a float, on a log scale
    data.rollouts_per_problem: {low: 4, high: 16, step: 4}    # an integer, since both ends are
    train.aggregation: [grpo, dapo, dr_grpo]                  # one of
    train.clip_high: {low: 0.2, high: 0.4, when: {train.epochs: [2, 3]}}   # only where another has such a value

Or in one line: `train.lr=[5e-6,1e-5] train.kl_coef=[0.02,0.05]`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from optuna.distributions import CategoricalDistribution

from grpo_mlflow import tasks
from grpo_mlflow.config import ENTRIES, TRAITS, Resolved, overlay, renamed, split_overrides, yaml12
from grpo_mlflow.errors import ConfigError
from grpo_mlflow.search import space_entry
from grpo_mlflow.search.space import Dimension, Distribution, Space, holds, values_of

_VARIES = [key for key, traits in TRAITS.items() if traits.varies]
_SECTIONS = ", ".join(dict.fromkeys(key.partition(".")[0] + "." * ("." in key) for key in _VARIES))


def shipped() -> list[str]:
    """Return the names of the shipped spaces."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _folder().iterdir() if entry.name.endswith(".yaml"))


def load(text: str, base: Resolved) -> Space:
    """Return the space that `text` names (shipped, or a file) or spells out, checked against the config.

    Both ends or all choices of every dimension are tried in the config before any trial starts.

    Raises:
        ConfigError: the space is not understood, or the config refuses one of its values.
    """
    where = f"search.space = {text!r}"
    content = _content(text, where)
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{where}: expected settings and what they vary over, such as train.lr: [1e-5, 1e-4]")
    dimensions: list[Dimension] = []
    flat = values_of(base.config)
    for key, entry in content.items():
        if key not in _VARIES and not (str(key).startswith(ENTRIES) and key in flat):
            raise ConfigError(f"{where}: {key}: cannot vary{_why(key)}; allowed: keys of {_SECTIONS} (--print-config)")
        real = isinstance(flat[key], float) or key.startswith(ENTRIES)
        dimensions.append(_dimension(str(key), entry, f"{where}: {key}", dimensions, real))
    by_key = {dimension.key: dimension for dimension in dimensions}
    for dimension in dimensions:
        conditions = _conditions(dimension, by_key)
        if impossible := [key for key, values in conditions.items() if not values]:
            raise ConfigError(f"{where}: {dimension.key}: is never on: what it depends on excludes {impossible[0]}")
        switched = {key: values[0] for key, values in conditions.items()}
        for value in _ends(dimension.distribution):
            varied = overlay(base, {**switched, dimension.key: value}, "space")
            varied.require_trainable()
            varied.require_searchable()
            tasks.require_scalable(varied.config)
    return Space(tuple(dimensions))


def _conditions(dimension: Dimension, by_key: Mapping[str, Dimension]) -> dict[str, list[Any]]:
    """Return the values that each setting above must have for a dimension to be on, the whole chain up."""
    found: dict[str, list[Any]] = {}
    for key, values in dimension.when.items():
        for other, allowed in {**_conditions(by_key[key], by_key), key: list(values)}.items():
            found[other] = [value for value in found.get(other, allowed) if value in allowed]
    return found


def _content(text: str, where: str) -> Any:
    """Return the YAML that `text` names or spells out."""
    if text in shipped():
        return yaml12.load((_folder() / f"{text}.yaml").read_text(), where)
    if "=" in text:
        pairs = [item.partition("=") for item in split_overrides(text)]
        content = {key: yaml12.load(value, where) for key, _, value in pairs}
        if len(content) < len(pairs):
            raise ConfigError(f"{where}: a setting is given twice")
        return content
    path = Path(os.path.expanduser(text))
    try:
        if not os.path.isfile(path):
            names = ", ".join(shipped())
            raise ConfigError(f"{where}: no such file or space; allowed: {names}, or KEY=[VALUES] ...")
        return yaml12.load(path.read_text(), where)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: cannot be read as text: {error}") from None


def _why(key: Any) -> str:
    if now := [name for name in renamed({key: 1.0}) if name != key]:
        return f", since it is {' and '.join(now)} now"
    if key in TRAITS and TRAITS[key].evaluation:
        return ", since it decides what evaluations measure, and trials measured differently cannot be compared"
    return ""


def _folder() -> Any:
    return resources.files("grpo_mlflow") / "search" / "spaces"


def _dimension(key: str, entry: Any, where: str, before: list[Dimension], real: bool) -> Dimension:
    """Return the dimension of an entry; `real` says that its setting is a float even if its ends are integers."""
    parsed = space_entry.parse(entry, where)
    above = {dimension.key: dimension.distribution for dimension in before}
    for other, values in parsed.when.items():
        if other not in above:
            raise ConfigError(f"{where}: when names {other}, which is not a setting above it in this space")
        for value in values:
            if not holds(above[other], value):
                raise ConfigError(f"{where}: when = {parsed.when!r}: {other} is never {value!r} in this space")
    try:
        found = parsed.distribution(real)
    except ValueError as error:
        raise ConfigError(f"{where} = {entry!r}: {' '.join(str(error).split())}") from None
    return Dimension(key, found, {other: tuple(values) for other, values in parsed.when.items()})


def _ends(distribution: Distribution) -> tuple[Any, ...]:
    if isinstance(distribution, CategoricalDistribution):
        return tuple(distribution.choices)
    return distribution.low, distribution.high
