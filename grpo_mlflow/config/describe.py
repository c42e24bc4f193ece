"""Every setting in words: its meaning, what it takes, its default and what presets and methods make of it.

All of it comes from the schema's classes, the presets and `methods`; help, docs/settings.md, the JSON schema and the
completion of shells read it here.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from grpo_mlflow.config import layers, methods, yaml12
from grpo_mlflow.config.fields import SHOWN, Section, Traits
from grpo_mlflow.config.keys import CLASSES, KEYS, TRAITS
from grpo_mlflow.config.schema import Config

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting as people read it.

    `allowed` says in words what it takes, `choices` lists the values that can be listed, as typed. `presets` and
    `methods` have the names of those that set another value than the default, with that value.
    """

    key: str
    meaning: str
    allowed: str
    choices: tuple[str, ...]
    default: Any
    presets: Mapping[str, Any]
    methods: Mapping[str, Any]
    traits: Traits


@cache
def settings() -> dict[str, Setting]:
    """Return all settings by their dotted keys, in the schema's order."""
    presets = {name: layers.read(name) for name in layers.presets()}
    return {key: _described(key, presets) for key in KEYS}


def sections() -> dict[str, str]:
    """Return the sections by their dotted names, in the schema's order, with what each is about."""
    return {name: _about(section) for name, section in CLASSES.items()}


def inside(section: str) -> list[str]:
    """Return the keys of a section, without those of the sections in it; of the empty name, those in no section."""
    return [key for key in KEYS if key.rpartition(".")[0] == section]


def grouped(values: Mapping[str, Any]) -> str:
    """Return values with the names that have each: `0.0004 (smoke, tiny), 2.0e-05 (rows)`."""
    names: dict[str, list[str]] = {}
    for name, value in values.items():
        names.setdefault(yaml12.inline(value), []).append(name)
    return ", ".join(f"{value} ({', '.join(who)})" for value, who in names.items())


def freedom(setting: Setting) -> str:
    """Return when a setting may change, in words."""
    if setting.key.startswith("search."):
        return "fixed once a study has begun" if setting.traits.compared else "a continued study may change it"
    resumed = "a resumed run may change it" if setting.traits.resume else "fixed once a run has begun"
    return f"{resumed}; a study may vary it" if setting.traits.varies else resumed


def _described(key: str, presets: Mapping[str, layers.Layer]) -> Setting:
    own = part(key)
    default = own["default"]
    of_presets = {name: layer[key][0] for name, layer in presets.items() if key in layer and layer[key][0] != default}
    of_methods: dict[str, Any] = {
        name: own[key] for name, own in methods.SETTINGS.items() if own.get(key, default) != default
    }
    choices = tuple(yaml12.inline(value) for value in _choices(own))
    meaning = str(KEYS[key])
    return Setting(key, meaning, allowed(own), choices, default, of_presets, of_methods, TRAITS[key])


def part(key: str) -> Json:
    """Return the JSON schema of a setting as pydantic writes it, with the traits and the words of `fields`."""
    section, _, name = key.rpartition(".")
    found: Json = _properties(CLASSES.get(section, Config))[name]
    return found


@cache
def _properties(section: type[Section]) -> dict[str, Any]:
    found: dict[str, Any] = section.model_json_schema()["properties"]
    return found


def _about(section: type[Section]) -> str:
    return inspect.cleandoc(section.__doc__ or "").split("\n\n")[0].replace("\n", " ")


def allowed(part: Json) -> str:
    """Return in words which values a part of a JSON schema takes."""
    if SHOWN in part:
        return str(part[SHOWN])
    if "anyOf" in part:
        if (names := _names(part)) is not None:
            return _alternatives(names)
        return "; or ".join(allowed(each) for each in part["anyOf"])
    if (names := _names(part)) is not None:
        return _alternatives(names)
    kind = part.get("type")
    if kind == "array":
        each = part.get("prefixItems")
        return f"list of {len(each)}, each {allowed(each[0])}" if each else f"list, each {allowed(part['items'])}"
    if kind == "object":
        values = part["additionalProperties"]
        return f"mapping of names to: {allowed(values)}" if "type" in values else "mapping"
    words = {"boolean": "true or false", "string": "text"}
    return words[kind] if kind in words else f"{kind}{_range(part)}"


def _names(part: Json) -> list[str] | None:
    """Return all values of a part that takes a few values only, else None."""
    if "anyOf" in part:
        found = [_names(each) for each in part["anyOf"]]
        return None if None in found else [name for names in found for name in names or ()]
    if part.get("type") == "null":
        return ["null"]
    values = part.get("enum", [part["const"]] if "const" in part else None)
    return None if values is None else [yaml12.inline(value) for value in values]


def _range(part: Json) -> str:
    low, high = part.get("minimum"), part.get("maximum")
    above, below = part.get("exclusiveMinimum"), part.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f", {low:g} to {high:g}"
    found = [f" above {above:g}"] if above is not None else []
    found += [f", {low:g} or more"] if low is not None else []
    found += [f", at most {high:g}"] if high is not None else []
    found += [f", below {below:g}"] if below is not None else []
    return "".join(found)


def _choices(part: Json) -> Sequence[Any]:
    if "anyOf" in part:
        found = [value for each in part["anyOf"] for value in _choices(each)]
        nullable = any(each.get("type") == "null" for each in part["anyOf"])
        return [*found, None] if nullable else found
    if part.get("type") == "boolean":
        return [True, False]
    return list(part.get("enum") or part.get("examples") or ([part["const"]] if "const" in part else []))


def _alternatives(names: Sequence[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
