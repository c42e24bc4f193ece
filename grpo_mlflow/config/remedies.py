"""Settings that do away with a contradiction: each is proposed only where the config takes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from grpo_mlflow.config.keys import flatten, nest
from grpo_mlflow.config.overrides import parse_overrides
from grpo_mlflow.config.schema import Config


@dataclass(frozen=True, slots=True)
class Contradiction:
    """A setting that contradicts others. `choices` are overrides (`a.b=1`, or several), or words for any others."""

    key: str
    value: object
    why: str
    choices: tuple[str, ...]


Find = Callable[[Config], Iterable[Contradiction]]


def changed(config: Config, words: str) -> Config:
    """Return the config with overrides, not checked for contradictions."""
    known = flatten(config.model_dump(mode="json"))
    return Config.model_validate(nest(known | parse_overrides(words.split())))


def accepted(config: Config, words: str, find: Find, gone: str = "") -> bool:
    """Return whether overrides bring no new contradiction, and do away with that of the key `gone`."""
    before, after = ({found.key for found in find(each)} for each in (config, changed(config, words)))
    return after <= before - {gone}


def line(config: Config, found: Contradiction, find: Find) -> str:
    """Return a contradiction as a line that ends with the choices that the config takes."""
    own = f"{found.key}="
    taken = [
        choice.removeprefix(own) if " " not in choice else choice
        for choice in found.choices
        if "=" not in choice or accepted(config, choice, find, found.key)
    ]
    several = f"{', '.join(taken[:-1])}, or {taken[-1]}" if len(taken) > 1 else taken[0]
    return f"{found.key} = {found.value}: {found.why}; allowed: {several}"
