"""How a server is started: what all kinds have in common, around the command of the engine's class."""

from __future__ import annotations

import os
import pkgutil
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

import torch

from grpo_mlflow.config import Config, ServerConfig, addresses
from grpo_mlflow.config.engines import SERVERS
from grpo_mlflow.generation.server.engine import EngineClass, Start
from grpo_mlflow.generation.server.sync import SYNCS
from grpo_mlflow.redaction import is_secret_name

_PORT = 30000  # where neither an address nor generation.server.port says one
EVERYWHERE = {4: "0.0.0.0", 6: "::"}  # all addresses of a machine, by the version of the protocol


@dataclass(frozen=True, slots=True)
class Launch:
    """A command with what it adds to the environment; `install` says how its program is installed.

    `variables` are those that its program takes in the place of options that hold secrets.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str]
    install: str
    variables: Mapping[str, str] = field(default_factory=dict)

    def private(self) -> tuple[list[str], dict[str, str]]:
        """Return command and environment with secrets in the environment: every user of a machine sees command lines.

        An option with several values stays, since a variable holds one.
        """
        words, environment = list(self.command), dict(self.environment)
        for option, variable in self.variables.items():
            for place in [i for i, word in enumerate(words) if word.partition("=")[0] == option][::-1]:
                _, equals, value = words[place].partition("=")
                after = words[place + 1 : place + 3]
                if equals:
                    del words[place]
                elif after and all(word.startswith("-") for word in after[1:]):
                    value = after[0]
                    del words[place : place + 2]
                else:
                    continue
                environment.setdefault(variable, value)  # of a repeated option the last one counts
        return words, environment

    def in_shell(self, secrets: bool = True) -> str:
        """Return the command as one line for a POSIX shell in the current folder; for messages without `secrets`."""
        here = Path.cwd()
        values = dict(self.environment)
        if "PYTHONPATH" in values and Path(values["PYTHONPATH"]).is_relative_to(here):
            values["PYTHONPATH"] = str(Path(values["PYTHONPATH"]).relative_to(here))
        words = self.command if secrets else _without_secrets(self.command)
        return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in values.items()), shlex.join(words)])


def _without_secrets(words: Sequence[str]) -> list[str]:
    found: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        name, equals, _ = word.partition("=")
        if before.startswith("-") and is_secret_name(before):
            word = "***"
        elif equals and name.startswith("-") and is_secret_name(name):
            word = f"{name}=***"
        found.append(word)
    return found


def engine_class(backend: str) -> EngineClass:
    """Return the class that speaks to servers of this kind, a name of `config.engines.SERVERS`."""
    found: EngineClass = pkgutil.resolve_name(SERVERS[backend].engine)
    return found


def launch(
    backend: str,
    settings: ServerConfig,
    model: str | Path,
    port: int,
    dtype: str,
    lora_rank: int | None = None,
    *,
    host: str = "127.0.0.1",
    trust_remote_code: bool = False,
    gpus: Sequence[int] = (),
) -> Launch:
    """Return how a server of this kind is started with a model; with `lora_rank` it takes adapters of that rank.

    `gpus` are those that it sees, by their numbers in this process; none: as `settings.device` says.
    """
    on_cpu = settings.device == "cpu" or (settings.device == "auto" and not torch.cuda.is_available())
    environment: dict[str, str] = {}
    if Path(model).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
    if settings.device.startswith("cuda:"):
        gpus = gpus or (int(settings.device.removeprefix("cuda:")),)
    if gpus:
        granted = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        names = (granted[number] if number < len(granted) else str(number) for number in gpus)
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(names)
    engine = engine_class(backend)
    start = Start(str(model), port, dtype, on_cpu, settings.memory, lora_rank, host, trust_remote_code, settings.sleep)
    own = engine.command(start)
    command = (settings.python or SERVERS[backend].python, *own.arguments, *settings.arguments)
    return Launch(command, {**environment, **own.environment}, engine.remedies.install, engine.remedies.variables)


def launch_as(
    config: Config, backend: str, model: str | Path, port: int, host: str = "127.0.0.1", *, gpus: Sequence[int] = ()
) -> Launch:
    """Return how a server of this kind is started with a model, for all that the config asks of it."""
    settings, own = _settings(config, backend), config.model
    if settings.device == "auto" and own.device.startswith("cuda"):  # also where the command is only shown
        settings = settings.model_copy(update={"device": "cuda"})
    rank = SYNCS[config.generation.sync].lora_rank(own.lora)
    trusts = own.trust_remote_code
    return launch(backend, settings, model, port, own.dtype, rank, host=host, trust_remote_code=trusts, gpus=gpus)


def start_command(
    config: Config, backend: str, base_url: str | None, model: str | Path, *, secrets: bool = True
) -> str:
    """Return the shell command that starts the server which `base_url` (None: this machine) is to be the address of."""
    host, port = "127.0.0.1", 0
    if base_url is None or base_url in addresses.of(config.generation.base_url):
        port = _settings(config, backend).port
    if base_url is None:
        port = port or _PORT
    else:
        address = urlsplit(base_url)
        host = listens_at(base_url)
        port = address.port or port or (443 if address.scheme == "https" else 80)
    return launch_as(config, backend, model, port, host).in_shell(secrets)


def listens_at(base_url: str) -> str:
    """Return the address that a server has to listen at to be reached at `base_url`.

    A name by which others reach a machine need not be one that it can listen at (a proxy's, a container's): all then.
    """
    name = urlsplit(base_url).hostname or "localhost"
    if name == "localhost":
        return "127.0.0.1"
    try:
        number = ip_address(name)
    except ValueError:
        return EVERYWHERE[4]
    return name if number.is_loopback else EVERYWHERE[number.version]


def _settings(config: Config, backend: str) -> ServerConfig:
    """Return `generation.server` as it is for a server of this kind.

    It is about servers of `generation.backend`: another kind has an environment and options of its own.
    """
    settings = config.generation.server
    if config.generation.backend in ("local", backend):
        return settings
    return ServerConfig(device=settings.device)
