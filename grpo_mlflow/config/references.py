"""References in values: `${ENV:NAME}` stands for an environment variable, so that no file has to hold a secret.

A config that is written anywhere has the reference in the place of the value again (`redaction`), and can be read back.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from grpo_mlflow import redaction
from grpo_mlflow.config.keys import TRAITS
from grpo_mlflow.errors import ConfigError

_REFERENCE = re.compile(r"\$\{ENV:([^}]*)\}")
_met = set[str]()


def expanded(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return values by dotted key with references replaced; what is secret in them is known from now on.

    Raises:
        ConfigError: a variable is not set; `where` names the place.
    """
    found = {key: _expanded(value, key, f"{key} ({where})") for key, value in values.items()}
    for key, value in found.items():
        redaction.learn_from(key, value)
    return found


def names() -> frozenset[str]:
    """Return the variables that values referred to which this process was given, wherever they stood."""
    return frozenset(_met)


def _expanded(value: Any, key: str, where: str) -> Any:
    if isinstance(value, str):
        return _REFERENCE.sub(lambda match: _variable(match, key, where), value)
    if isinstance(value, list):
        return [_expanded(inner, key, where) for inner in value]
    if isinstance(value, dict):
        return {name: _expanded(inner, f"{key}.{name}", where) for name, inner in value.items()}
    return value


def _variable(match: re.Match[str], key: str, where: str) -> str:
    try:
        value = os.environ[match[1]]
    except KeyError:
        raise ConfigError(f"{where}: {match[0]}: the environment variable {match[1]} is not set") from None
    _met.add(match[1])
    if any(key == name or key.startswith(f"{name}.") for name, traits in TRAITS.items() if traits.secret):
        redaction.learn(value, match[0])
    return value
