"""What `data.rewards` and `data.success` say, checked."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from grpo_mlflow.errors import ConfigError

BUILT_IN = ("exact", "contains", "number", "math", "regex", "json_schema", "tags", "length", "judge")
OWN = re.compile(r"python:([A-Za-z_][\w.]*|.+\.py):([A-Za-z_]\w*)")
_NAME = re.compile(r"[A-Za-z_][\w-]*")
_ENDS = ("_std", "_at_lowest", "_at_highest", "_applies")
_TAKEN = ("mean", "std", "overlong")  # metrics of their own
_USES = f"{', '.join(BUILT_IN)}, or python:MODULE:FUNCTION (a module, or the path of a .py file)"
KEY = "data.rewards"


@dataclass(frozen=True, slots=True)
class Entry:
    """A reward: its name, what gives it (`use`), its weight, the range of its values, and its other options."""

    name: str
    use: str
    weight: float
    range: tuple[float, float]
    options: Mapping[str, Any]
    key: str

    @property
    def own(self) -> tuple[str, str] | None:
        """The module and the function of the user's own, or None."""
        match = OWN.fullmatch(self.use)
        return (match[1], match[2]) if match else None


@dataclass(frozen=True, slots=True)
class Success:
    """What counts for pass@k: the reward `name` from the value `at_least` on."""

    name: str
    at_least: float


def entries(rewards: Mapping[str, Any]) -> list[Entry]:
    """Return the rewards in their order.

    Raises:
        ConfigError: one line that says which is wrong, and what is allowed.
    """
    found = [_entry(name, value) for name, value in rewards.items()]
    names = [entry.name for entry in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{KEY}: two rewards are called {name}; allowed: a name of its own for each")
        clash = [f"{other}{end}" for other in names for end in _ENDS if name == f"{other}{end}"]
        if name in _TAKEN or clash:
            raise ConfigError(f"{KEY}.{name}: train/reward_{name} is another metric; allowed: another name")
    return found


def success(given: Any, known: list[Entry]) -> tuple[Success, Entry | None]:
    """Return what counts as success, and what gives it where it is not among the rewards.

    Raises:
        ConfigError: as `entries`.
    """
    key, names = "data.success", [entry.name for entry in known]
    if given is None:
        return Success(names[0], 1.0), None
    content = {"name": given} if isinstance(given, str) else dict(given)
    at_least = _number(content.pop("at_least", 1.0), f"{key}: at_least")
    if "use" in content:
        entry = replace(_entry("success", content, key), name=key)  # no reward can have this name
        return Success(entry.name, at_least), entry
    name = content.pop("name", None)
    if name not in names or content:
        raise ConfigError(
            f"{key} = {given!r}: names no reward; allowed: one of {', '.join(names)}, {{name: NAME, at_least: X}}, "
            "or {use: NAME, OPTIONS} for what is no reward"
        )
    return Success(name, at_least), None


def _entry(name: str, value: Any, key: str | None = None) -> Entry:
    own = OWN.fullmatch(name)
    called = own[2] if own else name
    where = key or f"{KEY}.{called}"
    if not _NAME.fullmatch(called):
        raise ConfigError(f"{KEY}: {name!r} is no name; allowed: letters, digits, _ and -, or python:MODULE:FUNCTION")
    content = {"weight": value} if isinstance(value, (int, float)) else value
    if not isinstance(content, Mapping):
        raise ConfigError(f"{where} = {value!r}: allowed: a weight, or {{use: NAME, weight: 1, OPTIONS}}")
    options = dict(content)
    use, weight = options.pop("use", name), _number(options.pop("weight", 1.0), f"{where}: weight")
    if use not in BUILT_IN and not (isinstance(use, str) and OWN.fullmatch(use)):
        raise ConfigError(f"{where}: use = {use!r}; allowed: {_USES}")
    ends = options.pop("range", (0.0, 1.0)) if OWN.fullmatch(use) else (0.0, 1.0)
    if not isinstance(ends, (list, tuple)) or len(ends) != 2:
        raise ConfigError(f"{where}: range = {ends!r}; allowed: [LOW, HIGH]")
    low, high = (_number(end, f"{where}: range") for end in ends)
    if low >= high:
        raise ConfigError(f"{where}: range = {ends!r}; allowed: [LOW, HIGH]")
    return Entry(called, use, weight, (low, high), options, where)


def made(kind: Any, entry: Entry) -> Any:
    """Return an instance of a built-in kind with the entry's options.

    Raises:
        ConfigError: it has no such option, or refuses one.
    """
    known = list(inspect.signature(kind).parameters)
    for option in entry.options:
        if option not in known:
            allowed = ", ".join(["weight", *known])
            raise ConfigError(f"{entry.key}: {entry.use} has no option {option!r}; allowed: {allowed}")
    try:
        return kind(**entry.options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{entry.key}: {error}") from None


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{what} = {value!r}; allowed: a finite number")
    return float(value)
