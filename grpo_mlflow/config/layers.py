"""Presets and files as layers of settings, each value with its origin."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from grpo_mlflow import redaction
from grpo_mlflow.config import methods, references, yaml12
from grpo_mlflow.config.keys import TRAITS, flatten, renamed, short
from grpo_mlflow.errors import ConfigError

Layer = dict[str, tuple[Any, str]]  # dotted key -> (value, origin)
DEFAULT = "tiny"


def presets() -> list[str]:
    """Return the names of the shipped presets."""
    folder = resources.files("grpo_mlflow") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


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


def read(name: str, named_by: str = "config", beside: Path = Path(), seen: tuple[Path, ...] = ()) -> Layer:
    """Read a preset by name, or a file by its path (from the folder `beside`), on top of its `base`."""
    if name in presets():
        text = (resources.files("grpo_mlflow") / "presets" / f"{name}.yaml").read_text()
        path, where, origin = Path(name), f"preset {name}", f"preset {name}"
    else:
        path = beside / os.path.expanduser(name)
        if not os.path.isfile(path):  # a name too long for a file is none, either
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
    layer: Layer = read(base, f"{where}: base", path.parent, (*seen, path)) if base else {}
    values = flatten(content)
    for key in values.keys() & {key for key, traits in TRAITS.items() if traits.secret}:
        if redaction.HIDDEN in str(values[key]):  # a config that a run has stored
            raise ConfigError(
                f"{where}: {key} = {short(values[key])}: {redaction.HIDDEN} stands for a secret that was not written; "
                "allowed: the value, or ${ENV:NAME} for that of an environment variable"
            )
    return layer | layer_of(references.expanded(values, where), origin)


def layer_of(values: Mapping[str, Any], origin: str) -> Layer:
    """Return dotted keys with their origin, on top of what the method that they name sets."""
    values = renamed(values)
    name = values.get(methods.KEY)
    chosen: Layer = {key: (value, f"method {name}") for key, value in methods.settings(name).items()}
    return chosen | {key: (value, origin) for key, value in values.items()}
