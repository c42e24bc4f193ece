"""The servers that a run starts itself: as many as it wants, each with its port, its log and its GPUs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import torch

from grpo_mlflow.config import Config
from grpo_mlflow.generation.server.launch import Launch, launch_as
from grpo_mlflow.generation.server.process import ServerProcess, free_ports


def processes(
    config: Config, log: Path, say: Callable[[str], None], trainers: Collection[int] = ()
) -> list[ServerProcess]:
    """Return the servers of `generation.server`, which are not started yet.

    Args:
        config: how many, where, with what.
        log: the file for the output of the first; those of the others lie beside it, with a number in their name.
        say: takes lines about their progress.
        trainers: the GPUs of the processes that train on this machine.
    """
    settings, backend = config.generation.server, config.generation.backend
    shares = gpus(settings.device, settings.replicas, torch.cuda.device_count(), trainers)
    count, first = settings.replicas, settings.port
    ports = [first + i for i in range(count)] if first else free_ports(count)

    def process(number: int) -> ServerProcess:
        def start(model: str | Path, port: int) -> Launch:
            return launch_as(config, backend, model, port, gpus=shares[number])

        own = settings.model_copy(update={"port": ports[number]})
        return ServerProcess(start, own, log.with_stem(f"{log.stem}-{number}") if number else log, say)

    return [process(number) for number in range(count)]


def gpus(device: str, replicas: int, visible: int, trainers: Collection[int]) -> list[tuple[int, ...]]:
    """Return the GPUs of each replica, by their numbers among the visible ones; none: it computes on the CPU.

    Those that no trainer has are dealt out in equal parts, which a server with tensor parallelism uses whole; all are,
    where the trainers have them all. Where there are more replicas than GPUs, several share one.

    Args:
        device: as `generation.server.device`; cuda:N is the GPU of the first replica, the next ones follow.
        replicas: how many servers.
        visible: how many GPUs this process sees.
        trainers: which of them train.
    """
    if device.startswith("cuda:"):
        first = int(device.removeprefix("cuda:"))
        return [(first + i,) for i in range(replicas)]
    if device == "cpu" or not visible:
        return [()] * replicas
    pool = [number for number in range(visible) if number not in trainers] or [*range(visible)]
    if len(pool) < replicas:
        return [(pool[i % len(pool)],) for i in range(replicas)]
    each = len(pool) // replicas
    return [tuple(pool[i * each : (i + 1) * each]) for i in range(replicas)]
