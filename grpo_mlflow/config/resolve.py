"""From a preset or file and dotted overrides to one checked Config that knows where each value came from.

Later layers win: defaults < preset or file (a file may name a `base` of its own) < overrides. In a layer that names a
`train.method`, what the method sets comes first, so that the layer's own keys win over it and it over the layers below.
Where no preset or file is named, the model decides what is below the overrides (`model_defaults`). MLflow's variables
for the names of experiment and run win over defaults and presets alone (`environment`). In the end values of presets
and defaults that contradict what was set give way (`adapt`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from grpo_mlflow import redaction
from grpo_mlflow.config import (
    adapt,
    checks,
    describe,
    environment,
    idle,
    layers,
    methods,
    model_defaults,
    references,
    yaml12,
)
from grpo_mlflow.config.keys import KEYS, MAPPINGS, flatten, nest, short, unknown_line, with_entries
from grpo_mlflow.config.layers import Layer
from grpo_mlflow.config.mistakes import Mistakes
from grpo_mlflow.config.overrides import read_overrides
from grpo_mlflow.config.schema import Config
from grpo_mlflow.errors import ConfigError

_WIDEST = 60  # columns of a value that has its origin beside it
_MOST_LINES = 20  # of unknown keys: what is near each is looked for, and a file of another kind has thousands


@dataclass(frozen=True, slots=True)
class Resolved:
    """A checked config, the origin of each dotted key, and lines: what gave way, what cannot work as meant."""

    config: Config
    origins: Mapping[str, str]
    warnings: tuple[str, ...]

    def require_trainable(self) -> None:
        """Raise ConfigError if no training can make sense of the config."""
        if lines := checks.untrainable(self.config):
            raise ConfigError("\n".join(lines))

    def require_searchable(self) -> None:
        """Raise ConfigError if no study can work with the config."""
        if lines := checks.unsearchable(self.config):
            raise ConfigError("\n".join(lines))


def dump(config: Config) -> str:
    """Return the config as YAML that `resolve` reads back to an equal one, without secrets but by reference."""
    return yaml12.dump(redaction.without(config.model_dump(mode="json")))


def render(resolved: Resolved) -> str:
    """Return the config as YAML with the origin of each value beside it."""
    lines: list[tuple[str, str]] = []

    def walk(nested: Mapping[str, Any], prefix: str, indent: str) -> None:
        for name, value in nested.items():
            if isinstance(value, dict) and prefix + name not in MAPPINGS:
                lines.append((f"{indent}{name}:", ""))
                walk(value, f"{prefix}{name}.", indent + "  ")
            else:
                lines.append((f"{indent}{name}: {yaml12.inline(value)}", resolved.origins[prefix + name]))

    walk(redaction.without(resolved.config.model_dump(mode="json")), "", "")
    width = max(len(text) for text, origin in lines if origin and len(text) <= _WIDEST)
    return "".join(_line(text, origin, width) for text, origin in lines)


def _line(text: str, origin: str, width: int) -> str:
    if not origin:
        return f"{text}\n"
    if len(text) > width and len(text) + len(origin) > _WIDEST + 16:  # beside it, the terminal would break the line
        return f"{text[: len(text) - len(text.lstrip())]}# {origin}\n{text}\n"
    return f"{text:<{width}}  # {origin}\n"


def _validate(layer: Layer) -> Config:
    try:
        return Config.model_validate(nest({key: value for key, (value, _) in layer.items()}))
    except ValidationError as error:
        messages: dict[str, list[str]] = {}
        for item in error.errors(include_url=False):
            dotted = ".".join(str(part) for part in item["loc"])
            key = next(k for k in sorted(KEYS, key=len, reverse=True) if dotted == k or dotted.startswith(f"{k}."))
            text = item["msg"][0].lower() + item["msg"][1:]
            if item["type"] == "string_pattern_mismatch":  # a pattern is hard to read
                text = f"input should be {describe.settings()[key].allowed}"
            if text not in messages.setdefault(key, []):
                messages[key].append(text)
        raise ConfigError(
            "\n".join(
                f"{key} = {short(layer[key][0])} ({layer[key][1]}): {', or '.join(texts)} [{KEYS[key]}]"
                for key, texts in messages.items()
            )
        ) from None


def resolve(
    config: str = "",
    overrides: Sequence[str] = (),
    base: Mapping[str, Any] | None = None,
    origin: str = "",
    *,
    named_anew: bool = False,
) -> Resolved:
    """Resolve a preset name or file path (empty: as the model needs) and `key=value` overrides into a checked config.

    `base` (nested, with its `origin`) takes the place of the preset or file, for a config that was stored in a run;
    `named_anew` if it is for a run of its own, which MLflow's variables may name.

    Raises:
        ConfigError: a key is unknown, a value has the wrong type or range, or values contradict each other.
    """
    redaction.learn_environment()
    mistakes = Mistakes()
    given = read_overrides(overrides, mistakes)
    layer = model_defaults.start(given) if base is None else Layer()
    below = Mistakes()
    with below.noted():
        if base is not None:
            layer = layers.layer_of(references.expanded(flatten(base), origin), origin)
        elif config:
            layer = layers.read(config)
    if base is None or named_anew:
        layer |= {key: value for key, value in environment.layer().items() if _may_name(_origin(layer, key), origin)}
    mistakes.lines += below.lines
    with mistakes.noted():
        layer = with_entries(layer | layers.layer_of(given, "override"))
    resume, named_by = layer.get("resume", (None, ""))
    if base is None and resume is not None and named_by != "override":
        mistakes.lines.append(f"resume = {resume!r} ({named_by}): allowed on the command line only")
    with mistakes.noted():
        _require_known(layer)
    found: Resolved | None = None
    with mistakes.noted():
        known = {key: value for key, value in layer.items() if key in KEYS}
        if below.lines:  # without the file, it is not known what contradicts its values
            _validate(known)
        else:
            found = _finish(*_adapted(known))
    mistakes.require_none()
    assert found is not None, "else there was a mistake"
    return found


def _require_known(layer: Layer) -> None:
    unknown = [key for key in layer if key not in KEYS]
    if unknown:
        lines = [unknown_line(key, *layer[key]) for key in unknown[:_MOST_LINES]]
        if more := len(unknown) - len(lines):
            lines.append(f"and {more} further unknown keys")
        raise ConfigError("\n".join(lines))


def _adapted(layer: Layer, first: Iterable[adapt.Change] = ()) -> tuple[Layer, list[str]]:
    """Return the layer with values that gave way to what was set, and a line for each; those of `first` stay."""
    layer, told = dict(layer), []
    settled: set[str] = set()

    def free(key: str) -> bool:
        return key not in settled and is_free(_origin(layer, key))

    def settle(config: Config, changes: Iterable[adapt.Change]) -> None:
        for change in changes:
            old, origin = flatten(config.model_dump(mode="json"))[change.key], _origin(layer, change.key)
            layer[change.key] = (change.value, f"adapted from {short(old)} ({origin})")
            told.append(f"{change.key} = {short(change.value)}, not {short(old)} ({origin}): {change.why}")

    first = list(first)
    settle(_validate(layer), first)
    settled |= {change.key for change in first}
    for rule in adapt.RULES:
        config = _validate(layer)
        settle(config, rule(config, free))
    return layer, told


def _may_name(origin: str, stored: str) -> bool:
    """Return whether a variable wins over a value of this origin; `stored` is that of a run's own config."""
    return is_free(origin) or origin == stored


def is_free(origin: str) -> bool:
    """Return whether nobody chose a value of this origin."""
    return origin == "default" or origin.startswith("preset ")


def fitted(resolved: Resolved, changes: Sequence[adapt.Change]) -> Resolved:
    """Return the config with values that gave way to what only a task knows, and what gives way to them in turn.

    Raises:
        ConfigError: what was set contradicts them.
    """
    if not changes:
        return resolved
    known = flatten(resolved.config.model_dump(mode="json"))
    layer, told = _adapted({key: (value, resolved.origins[key]) for key, value in known.items()}, changes)
    found = _finish(layer, told)
    return replace(found, warnings=tuple(dict.fromkeys([*resolved.warnings, *found.warnings])))


def _origin(layer: Layer, key: str) -> str:
    return layer[key][1] if key in layer else "default"


def overlay(resolved: Resolved, values: Mapping[str, Any], origin: str) -> Resolved:
    """Return the config with some dotted keys changed, checked like any other.

    A method among them leaves alone what was given on the command line; the one that the config has changes nothing,
    since what was set beside it stays.

    Raises:
        ConfigError: as `resolve`.
    """
    known = flatten(resolved.config.model_dump(mode="json"))
    layer: Layer = {key: (value, resolved.origins[key]) for key, value in known.items()}
    changed = layers.layer_of(values, origin)
    same = methods.KEY in values and values[methods.KEY] == known[methods.KEY]
    kept = {key for key in changed if key not in values and (same or resolved.origins[key] == "override")}
    layer = with_entries(layer | {key: value for key, value in changed.items() if key not in kept})
    _require_known(layer)
    return _finish(layer)


def _finish(layer: Layer, told: Sequence[str] = ()) -> Resolved:
    config = _validate(layer)
    errors = checks.errors(config)
    if errors:
        raise ConfigError("\n".join(errors))
    origins = {key: _origin(layer, key) for key in KEYS}
    return Resolved(config, origins, (*told, *idle.warnings(config, _chosen(config, origins))))


def _chosen(config: Config, origins: Mapping[str, str]) -> list[str]:
    """Return the keys that somebody set: by an override, or in a file, which may be a dump that holds all defaults."""
    values, defaults = (flatten(each.model_dump()) for each in (config, Config()))
    return [
        key
        for key, origin in origins.items()
        if origin == "override" or (origin.startswith("file") and values[key] != defaults[key])
    ]
