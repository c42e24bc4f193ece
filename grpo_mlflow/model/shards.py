"""How a model comes into shards: its layers, and each process's share of every tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from grpo_mlflow.errors import ConfigError, ModelError
from grpo_mlflow.forward.layers import Float32Linear
from grpo_mlflow.model import sharding


def layers_of(model: Any) -> list[nn.Module]:
    """Return the layers of a model, which are gathered one at a time.

    Raises:
        ConfigError: the model does not say what they are.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"train.sharding = 'full': {type(model).__name__} does not say what its layers are; allowed: none"
        )
    return layers


def described(model: Any) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Return names, shapes and types of a model's parameters, in order."""
    return [(name, tuple(each.shape), each.dtype) for name, each in model.named_parameters()]


def conform(model: Any, wanted: Sequence[tuple[str, tuple[int, ...], torch.dtype]]) -> None:
    """Give parameters without numbers the types that they have in another process.

    Raises:
        ModelError: the model has others.
    """
    for (name, parameter), (called, shape, dtype) in zip(list(model.named_parameters()), wanted, strict=False):
        if (name, parameter.shape) != (called, shape):
            raise ModelError(
                f"train.sharding = 'full': {type(model).__name__} has {name} {tuple(parameter.shape)} here where the "
                f"first process has {called} {shape}; allowed: the same files and packages on all machines"
            )
        if parameter.dtype != dtype or not parameter.is_meta:
            empty = torch.empty(shape, dtype=dtype, device="meta")
            _set(model, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
    if len(described(model)) != len(wanted):
        raise ModelError(
            f"train.sharding = 'full': {type(model).__name__} has {len(described(model))} parameters here, and "
            f"{len(wanted)} in the first process; allowed: the same files and packages on all machines"
        )


def spread(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Shard a model whose weights are all in the first process, and on the meta device in the others.

    Every process calls this, and gets its shards from the first, tensor by tensor. The first lets go of the others'.

    Args:
        dtype: of the computation; gathered weights have it, gradients are summed in float32. If the output layer
            computes in float32, what is outside of the layers is gathered as it is stored.
    """
    is_first = dist.get_rank() == 0
    if not is_first:
        _shard(model, device, dtype)
    for name, buffer in list(model.named_buffers()):
        given = buffer.to(device) if is_first or not buffer.is_meta else torch.empty_like(buffer, device=device)
        dist.broadcast(given.contiguous(), 0)
        _set(model, name, given)
    for name, parameter in list(model.named_parameters()):
        if is_first:
            dist.broadcast(parameter.detach().contiguous(), 0)
        else:
            _receive(model, name, parameter, device)
    if is_first:
        _shard(model, device, dtype)
    else:
        model.tie_weights()
    for part in sharding.parts(model):
        part.set_gradient_divide_factor(1.0)  # a sum, not a mean: weights of tokens count all processes' tokens
        part.set_force_sum_reduction_for_comms(True)  # gloo has no other
    sharding.know(model, device)


def _shard(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    low = dtype != torch.float32
    # Autocast would keep a cast copy of all weights until the backward pass, and so undo the sharding.
    policy = MixedPrecisionPolicy(dtype, torch.float32) if low else MixedPrecisionPolicy()
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    exact = isinstance(model.get_output_embeddings(), Float32Linear)  # rounded weights would make its float32 useless
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy() if exact else policy)


def _receive(model: Any, name: str, parameter: Any, device: torch.device) -> None:
    whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    dist.broadcast(whole, 0)
    own = sharding.shard_of(whole[rows_of(parameter)].clone(), parameter, parameter.shape)
    _set(model, name, nn.Parameter(own, requires_grad=parameter.requires_grad))


def rows_of(tensor: DTensor) -> slice:
    """Return which rows of a tensor in shards this process holds."""
    mesh, count = tensor.device_mesh, tensor.shape[0]
    start = min(mesh.get_local_rank() * most_rows(tensor), count)
    return slice(start, min(start + most_rows(tensor), count))


def most_rows(tensor: DTensor) -> int:
    """Return how many rows of a tensor in shards each process holds, but for the last ones."""
    return -(-tensor.shape[0] // tensor.device_mesh.size())  # as torch.chunk cuts


def _set(model: Any, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    held = module._parameters if leaf in module._parameters else module._buffers
    held[leaf] = tensor
