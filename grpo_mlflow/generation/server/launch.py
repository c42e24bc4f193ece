"""How a server of our own is started: what all kinds have in common, around the command of the engine's class."""

from __future__ import annotations

import os
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from grpo_mlflow.config import ServerConfig
from grpo_mlflow.config.engines import SERVERS
from grpo_mlflow.generation.server.engine import EngineClass, Start

SERVERSIDE = Path(__file__).resolve().parents[2] / "serverside"


@dataclass(frozen=True, slots=True)
class Launch:
    """A command with what it adds to the environment; `install` says how its program is installed."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    install: str


def engine_class(backend: str) -> EngineClass:
    """Return the class that speaks to servers of this kind, a name of `config.engines.SERVERS`."""
    found: EngineClass = pkgutil.resolve_name(SERVERS[backend].engine)
    return found


def launch(
    backend: str, settings: ServerConfig, model: str | Path, port: int, dtype: str, lora_rank: int | None = None
) -> Launch:
    """Return how a server of this kind is started with a model; with `lora_rank` it takes adapters of that rank."""
    on_cpu = settings.device == "cpu" or (settings.device == "auto" and not torch.cuda.is_available())
    environment = {"PYTHONPATH": str(SERVERSIDE)}
    if Path(model).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
    if settings.device.startswith("cuda:"):
        number = int(settings.device.removeprefix("cuda:"))
        granted = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        environment["CUDA_VISIBLE_DEVICES"] = granted[number] if number < len(granted) else str(number)
    engine = engine_class(backend)
    own = engine.command(Start(str(model), port, dtype, on_cpu, settings.memory, lora_rank))
    command = (settings.python, *own.arguments, *settings.arguments)
    return Launch(command, {**environment, **own.environment}, engine.remedies.install)
