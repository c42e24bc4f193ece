"""What a run starts from when it names no preset and no file: the defaults that suit its model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_mlflow.config import layers, yaml12
from grpo_mlflow.config.layers import DEFAULT, Layer
from grpo_mlflow.errors import ConfigError

NO_SERVER = "no server named"


def start(chosen: Mapping[str, Any]) -> Layer:
    """Return the layer below the overrides `chosen`: the preset `tiny` for the embedded model, nothing for others.

    Where nothing is laid, the schema's defaults hold, which are the guide's. They sample on a server; without an
    address of one, or one to start, a run samples in its own process. A backend that was chosen stays.
    """
    model = chosen.get("model.train_id", "tiny")
    if not isinstance(model, str) or _descends_from_tiny(model, ()):
        return layers.read(DEFAULT)
    named = ("generation.backend", "generation.base_url", "generation.server.manage")
    return {} if any(chosen.get(key) for key in named) else {"generation.backend": ("local", NO_SERVER)}


def _descends_from_tiny(name: str, seen: tuple[str, ...]) -> bool:
    """Return whether a model is `tiny`, its folder in the cache, or a checkpoint of a run that trained one of these."""
    if name == "tiny":
        return True
    folder = Path(os.path.expanduser(name))
    if os.path.isfile(folder / "recipe.json"):
        return True
    config = folder / "trainer" / "config.yaml"
    if name in seen or not os.path.isfile(config):
        return False
    try:
        trained = yaml12.load(config.read_text(), str(config))["model"]["train_id"]
    except (ConfigError, OSError, UnicodeDecodeError, KeyError, TypeError):  # loading it tells what is wrong with it
        return False
    return isinstance(trained, str) and _descends_from_tiny(trained, (*seen, name))
