"""A model in shards: the first process reads it, checks it and proves its ways, and leaves each other its share.

The others build it without numbers and get theirs tensor by tensor, so none but the first ever holds more than a shard
and a tensor, and that one no more than one model at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from grpo_mlflow.config import Config
from grpo_mlflow.errors import ConfigError
from grpo_mlflow.forward import layers, ways
from grpo_mlflow.generation.local import ways as sampling
from grpo_mlflow.model import export, lora, policy, shards
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.model.recomputing import recompute_activations
from grpo_mlflow.runtime.processes import Processes

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Told:
    """What the first process tells of a model. `policy` has none, and no tokenizer; the others read their own."""

    policy: Policy
    most: int
    adapter: Any
    stored: torch.dtype
    parameters: list[tuple[str, tuple[int, ...], torch.dtype]]
    is_trained: bool
    scoring: ways.Scoring
    sampler: sampling.Sampler


class Turn(Protocol):
    """Does a piece of loading, in this process's turn."""

    def __call__(self, work: Callable[[], T]) -> T: ...


Make = Callable[[Turn], tuple[Policy, int]]
"""Loads a model; also returns the most tokens that a row will have."""


Load = Callable[[Make, str | Path], tuple[Policy, int]]
"""Loads a model in all processes; also takes what it is loaded from in this one."""


def loads(config: Config, processes: Processes, source: str | Path) -> Load:
    """Return what loads the models of a run, the trained one from `source`.

    Raises:
        ConfigError: models are to be in shards, and this one cannot be.
    """
    if config.train.sharding == "none" or processes.count == 1:  # who is alone has nothing to share
        return loads_whole(processes)
    processes.agreed((lambda: _require_shardable(config, processes, source)) if processes.is_first else lambda: None)
    return lambda make, named: _spread(config, processes, make, named)


def loads_whole(processes: Processes) -> Load:
    """Return what loads a whole model in each process."""
    return lambda make, _: make(processes.one_after_first)


def _require_shardable(config: Config, processes: Processes, source: str | Path) -> None:
    """Refuse before any weights are read."""
    empty = policy.empty_model(config.model, source)
    shards.layers_of(empty)
    export.require_plain_names(empty)
    backends = {"generation.backend": config.generation.backend}
    if config.eval.enabled:
        backends["eval.backend"] = config.eval.backend or config.generation.backend
    for key, backend in backends.items():
        if backend == "local":
            _require_room(config, processes, sum(each.numel() for each in empty.parameters()), key)


def _require_room(config: Config, processes: Processes, weights: int, key: str) -> None:
    """Refuse sampling in this process where all weights do not fit its memory."""
    device = processes.accelerator.device
    need = weights * getattr(torch, config.model.dtype).itemsize
    if device.type == "cuda":
        room, where = torch.cuda.get_device_properties(device).total_memory, "the GPU"
    else:
        share = int(os.environ.get("LOCAL_WORLD_SIZE", processes.count))
        room, where = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // share, "a process's share of memory"
    if need > room:
        raise ConfigError(
            f"{key} = 'local': to sample, each process gathers all weights, {need / 2**30:.1f} GiB, and "
            f"{where} is {room / 2**30:.1f} GiB; allowed: vllm_server or sglang_server"
        )


def _spread(config: Config, processes: Processes, make: Make, source: str | Path) -> tuple[Policy, int]:
    """Load a model in the first process, and return it in shards.

    Raises:
        ModelError: it cannot be used.
    """
    found = processes.agreed((lambda: _made(make)) if processes.is_first else lambda: None)
    told = processes.broadcast(_tell(*found) if found else None)
    assert told is not None, "the first process tells"
    like = replace(told.policy, name=str(source), device=processes.accelerator.device)
    heard = processes.agreed((lambda: None) if found else lambda: _heard(config, told, like))
    own = found[0] if found else heard
    assert own is not None
    with processes.collective(common=False):
        shards.spread(own.model, own.device, own.dtype)
    return own, told.most


def _made(make: Make) -> tuple[Policy, int]:
    found, most = make(lambda work: work())
    shards.layers_of(found.model)
    export.require_plain_names(found.model)
    return found, most


def _tell(found: Policy, most: int) -> _Told:
    trained = any(each.requires_grad for each in found.model.parameters())
    return _Told(
        replace(found, model=None, tokenizer=None, template_settings=dict(found.template_settings)),
        most,
        lora.settings_of(found.model),
        layers.stored_in(found.model),
        shards.described(found.model),
        trained,
        ways.scoring(found.model),
        sampling.sampler(found),
    )


def _heard(config: Config, told: _Told, like: Policy) -> Policy:
    found = policy.load_empty(config.model, like, told.adapter, told.stored)
    shards.conform(found.model, told.parameters)
    if not told.is_trained:
        found.model.requires_grad_(False)
    elif config.model.gradient_checkpointing:
        recompute_activations(found.model)
    ways.know(found.model, told.scoring)
    sampling.know(found, told.sampler)
    return found
