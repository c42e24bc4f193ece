"""A command that continues a run: it may repeat the run's settings, and change those that may change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grpo_mlflow import redaction
from grpo_mlflow.config import yaml12
from grpo_mlflow.config.command import Arguments
from grpo_mlflow.config.keys import TEXT, TRAITS, flatten, renamed, short, summary
from grpo_mlflow.config.layers import DEFAULT
from grpo_mlflow.config.overrides import parse_overrides
from grpo_mlflow.config.resolve import resolve
from grpo_mlflow.config.schema import Config
from grpo_mlflow.errors import ConfigError

_ON_RESUME = summary({key for key, traits in TRAITS.items() if traits.resume})


def changes(arguments: Arguments, stored: Mapping[str, Any]) -> tuple[str, ...]:
    """Return those overrides that may change something in a run whose config (nested) is `stored`.

    What else was given equals the run's own settings and is left out, so that a `train.method` that is repeated does
    not lay its settings anew over what the run set beside it. Secrets are given again: the run has not stored them.

    Raises:
        ConfigError: a setting that cannot change has another value than in the run.
    """
    own = flatten(Config().model_dump(mode="json")) | renamed(flatten(stored))
    given = renamed(parse_overrides(arguments.overrides))
    fixed = {key: value for key, value in given.items() if not _may_change(key)}
    for key, value in fixed.items():
        if key not in own or own[key] not in (value, redaction.without(value)):
            allowed = ", ".join(name + ("*" if name.endswith(".") else "") for name in _ON_RESUME)
            known = f"the run has {short(own[key])}, which" if key in own else "it"
            raise ConfigError(f"{key} = {short(value)} (override): {known} cannot change on resume; allowed: {allowed}")
    _require_same(arguments, own)
    return tuple(_item(key, value) for key, value in given.items() if key not in fixed or own[key] != value)


def _require_same(arguments: Arguments, own: Mapping[str, Any]) -> None:
    """Raise ConfigError if the preset or file of the command says something else than the run's settings `own`.

    The preset `tiny` passes: it stood in each command that named none.
    """
    if arguments.config in ("", DEFAULT):
        return
    repeated = resolve(arguments.config, arguments.overrides)
    values = flatten(repeated.config.model_dump(mode="json"))
    for key, origin in repeated.origins.items():
        told = origin.startswith(("preset ", "file ", "method "))
        if told and not _may_change(key) and values[key] != own[key]:
            raise ConfigError(
                f"config = {arguments.config!r}: with resume the config comes from the run, which has {key} = "
                f"{short(own[key])}, not {short(values[key])}; allowed: none"
            )


def _may_change(key: str) -> bool:
    """Return whether a key may be given on resume, or is unknown in a section that may change: `resolve` refuses it."""
    return any(key.startswith(name) if name.endswith(".") else key == name for name in _ON_RESUME)


def _item(key: str, value: Any) -> str:
    """Return the override that `parse_overrides` reads as this value."""
    if key in TEXT and not isinstance(value, (list, tuple)):
        return f"{key}={'' if value is None else value}"
    return f"{key}={yaml12.inline(value)}"
