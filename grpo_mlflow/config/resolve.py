"""From a preset or file and dotted overrides to one checked Config that knows where each value came from.

Later layers win: defaults < preset or file (a file may name a `base` of its own) < overrides. In a layer that names a
`train.method`, what the method sets comes first, so that the layer's own keys win over it and it over the layers below.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from grpo_mlflow.config import checks, methods, yaml12
from grpo_mlflow.config.schema import Config
from grpo_mlflow.errors import ConfigError

Layer = dict[str, tuple[Any, str]]  # dotted key -> (value, origin)


@dataclass(frozen=True, slots=True)
class Resolved:
    """A checked config, the origin of each dotted key, and what is legal but cannot work as meant."""

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


_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
_ITEM = re.compile(rf"{_KEY.pattern}=")


def _short(value: Any) -> str:
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)  # null, true as typed
    return text if len(text) <= 300 else f"{text[:300]}..."


def _leaves(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Return every dotted key with its definition."""
    found: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and get_origin(kind) is None and issubclass(kind, BaseModel):
            found |= _leaves(kind, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


DEFAULT = "tiny"
_FIELDS = _leaves(Config)
KEYS = {key: field.description for key, field in _FIELDS.items()}
_TEXT = {key for key, field in _FIELDS.items() if field.annotation in (str, str | None)}
_MAPPINGS = {key for key, field in _FIELDS.items() if get_origin(field.annotation) is dict}  # one value, not a section
SECTIONS = sorted({key.rsplit(".", depth)[0] for key in KEYS for depth in range(1, key.count(".") + 1)})


def presets() -> list[str]:
    """Return the names of the shipped presets."""
    folder = resources.files("grpo_mlflow") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested mappings into dotted keys; a setting whose value is itself a mapping keeps it whole."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and value and f"{prefix}{key}" not in _MAPPINGS:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def dump(config: Config) -> str:
    """Return the config as YAML that `resolve` reads back to an equal one."""
    return yaml12.dump(config.model_dump(mode="json"))


def render(resolved: Resolved) -> str:
    """Return the config as YAML with the origin of each value beside it."""
    lines: list[tuple[str, str]] = []

    def walk(nested: Mapping[str, Any], prefix: str, indent: str) -> None:
        for name, value in nested.items():
            if isinstance(value, dict) and prefix + name not in _MAPPINGS:
                lines.append((f"{indent}{name}:", ""))
                walk(value, f"{prefix}{name}.", indent + "  ")
            else:
                text = yaml12.dump(value, flow=True).removesuffix("...\n").strip()
                lines.append((f"{indent}{name}: {text}", resolved.origins[prefix + name]))

    walk(resolved.config.model_dump(mode="json"), "", "")
    width = max(len(text) for text, origin in lines if origin)
    return "\n".join(f"{text:<{width}}  # {origin}" if origin else text for text, origin in lines) + "\n"


def _mapping(text: str, where: str) -> dict[str, Any]:
    content = yaml12.load(text, where)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: a config file holds a mapping of sections, not {type(content).__name__}")
    for key in content:
        if not isinstance(key, str):
            raise ConfigError(f"{where}: key {key!r}: a config file holds a mapping of sections by name")
    return content


def _read(name: str, named_by: str = "config", beside: Path = Path(), seen: tuple[Path, ...] = ()) -> Layer:
    """Read a preset by name, or a file by its path (from the folder `beside`), on top of its `base`."""
    if name in presets():
        text = (resources.files("grpo_mlflow") / "presets" / f"{name}.yaml").read_text()
        path, where, origin = Path(name), f"preset {name}", f"preset {name}"
    else:
        path = beside / os.path.expanduser(name)
        if not path.is_file():
            raise ConfigError(f"{named_by} = {name!r}: no such file or preset; presets: {', '.join(presets())}")
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{named_by} = {name!r}: cannot be read as text: {error}") from None
        where, origin = str(path), f"file {path.name}"
    if path in seen:
        raise ConfigError(f"{named_by} = {name!r}: leads back to itself")
    content = _mapping(text, where)
    base = content.pop("base", None)
    if base is not None and not isinstance(base, str):
        raise ConfigError(f"{where}: base = {base!r}: expected the name of a preset or a file")
    layer: Layer = _read(base, f"{where}: base", path.parent, (*seen, path)) if base else {}
    return layer | _layer(flatten(content), origin)


def _layer(values: Mapping[str, Any], origin: str) -> Layer:
    """Return dotted keys with their origin, on top of what the method that they name sets."""
    name = values.get(methods.KEY)
    chosen: Layer = {key: (value, f"method {name}") for key, value in methods.settings(name).items()}
    return chosen | {key: (value, origin) for key, value in values.items()}


def parse_overrides(items: Iterable[str]) -> dict[str, Any]:
    """Turn `key=value` items into dotted keys; values are YAML (`5e-6`, `'[1,2]'`, `null`).

    Raises:
        ConfigError: an item has no `=`, no key, or a value that is not YAML.
    """
    found: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        key = key.strip()
        if not equals or not _KEY.fullmatch(key):
            raise ConfigError(f"override {_short(item)}: expected key=value, such as train.lr=5e-6")
        if key in _TEXT:  # as it stands: a run id of digits is not a number, a colon no mapping
            value = None if text in ("", "~", "null") else text
        else:
            value = yaml12.load(text, f"override {_short(item)}")
        found |= flatten({key: value})
    return found


def split_overrides(text: str) -> list[str]:
    """Split one line of overrides as a shell does, but not at the spaces inside a value's brackets.

    Raises:
        ConfigError: a quote is not closed, or brackets hold spaces and quotes, which a shell would take away.
    """
    try:
        pieces = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"overrides = {text!r}: {str(error).lower()}") from None
    found: list[str] = []
    for piece in pieces:
        if found and _is_open(found[-1]) and not _ITEM.match(piece):
            found[-1] += f" {piece}"
            if found[-1] not in " ".join(text.split()):
                raise ConfigError(
                    f"overrides = {text!r}: {found[-1].partition('=')[0]}: a value with spaces and quotes needs quotes "
                    "of its own, such as data.mix='{arithmetic: 0.7, sat: 0.3}'"
                )
        else:
            found.append(piece)
    return found


def _is_open(piece: str) -> bool:
    return piece.count("[") + piece.count("{") > piece.count("]") + piece.count("}")


def _unknown(key: str, value: Any, origin: str) -> str:
    start = f"{key} = {_short(value)} ({origin})"
    if key in SECTIONS:
        return f"{start}: is a section; set a key in it: {', '.join(k for k in KEYS if k.startswith(f'{key}.'))}"
    for mapping in _MAPPINGS:
        if key.startswith(f"{mapping}."):
            return f"{start}: unknown key; {mapping} takes a whole mapping: {mapping}='{{NAME: VALUE}}'"
    name, section = key.rsplit(".", 1)[-1], key.rpartition(".")[0]
    close = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.85) + [k for k in KEYS if k.rsplit(".", 1)[-1] == name]
    if close:
        return f"{start}: unknown key; did you mean {' or '.join(dict.fromkeys(close))}?"
    while section and section not in SECTIONS:
        section = section.rpartition(".")[0]
    inside = [k for k in KEYS if k.startswith(f"{section}.")] if section else [k.split(".")[0] for k in KEYS]
    return f"{start}: unknown key; allowed: {', '.join(dict.fromkeys(inside))}"


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return nested


def _validate(layer: Layer) -> Config:
    try:
        return Config.model_validate(_nest({key: value for key, (value, _) in layer.items()}))
    except ValidationError as error:
        messages: dict[str, list[str]] = {}
        for item in error.errors(include_url=False):
            dotted = ".".join(str(part) for part in item["loc"])
            key = next(k for k in sorted(KEYS, key=len, reverse=True) if dotted == k or dotted.startswith(f"{k}."))
            text = item["msg"][0].lower() + item["msg"][1:]
            if text not in messages.setdefault(key, []):
                messages[key].append(text)
        raise ConfigError(
            "\n".join(
                f"{key} = {_short(layer[key][0])} ({layer[key][1]}): {', or '.join(texts)} [{KEYS[key]}]"
                for key, texts in messages.items()
            )
        ) from None


def resolve(
    config: str = "", overrides: Sequence[str] = (), base: Mapping[str, Any] | None = None, origin: str = ""
) -> Resolved:
    """Resolve a preset name or file path (empty: `tiny`) and `key=value` overrides into a checked config.

    `base` (nested, with its `origin`) takes the place of the preset or file, for a config that was stored in a run.

    Raises:
        ConfigError: a key is unknown, a value has the wrong type or range, or values contradict each other.
    """
    layer: Layer = _read(config or DEFAULT) if base is None else _layer(flatten(base), origin)
    layer |= _layer(parse_overrides(overrides), "override")
    resume, named_by = layer.get("resume", (None, ""))
    if base is None and resume is not None and named_by != "override":
        raise ConfigError(f"resume = {resume!r} ({named_by}): allowed on the command line only")
    return _finish(layer)


def overlay(resolved: Resolved, values: Mapping[str, Any], origin: str) -> Resolved:
    """Return the config with some dotted keys changed, checked like any other.

    A method among them leaves alone what was given on the command line.

    Raises:
        ConfigError: as `resolve`.
    """
    known = flatten(resolved.config.model_dump(mode="json"))
    layer: Layer = {key: (value, resolved.origins[key]) for key, value in known.items()}
    changed = _layer(values, origin)
    given = {key for key in changed if key not in values and resolved.origins[key] == "override"}
    return _finish(layer | {key: value for key, value in changed.items() if key not in given})


def _finish(layer: Layer) -> Resolved:
    unknown = [_unknown(key, value, where) for key, (value, where) in layer.items() if key not in KEYS]
    if unknown:
        raise ConfigError("\n".join(unknown))
    config = _validate(layer)
    errors = checks.errors(config)
    if errors:
        raise ConfigError("\n".join(errors))
    origins = {key: layer[key][1] if key in layer else "default" for key in KEYS}
    return Resolved(config, origins, tuple(checks.warnings(config, _chosen(config, origins))))


def _chosen(config: Config, origins: Mapping[str, str]) -> list[str]:
    """Return the keys that somebody set: by an override, or in a file, which may be a dump that holds all defaults."""
    values, defaults = (flatten(each.model_dump()) for each in (config, Config()))
    return [
        key
        for key, origin in origins.items()
        if origin == "override" or (origin.startswith("file") and values[key] != defaults[key])
    ]
