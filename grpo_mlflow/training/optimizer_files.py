"""An optimizer's state on disk: `<parameter index>.<name>` in a safetensors file, also of a model in shards.

A sharded one is gathered, and read, tensor by tensor: each process reads the rows that are its own, whatever number of
processes wrote the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from grpo_mlflow.model import sharding, shards, tensor_files
from grpo_mlflow.training.checkpoint import reading

_CODES, _BLOCK = 256, 256  # values of 8 bits; numbers that share a scale
# Tensors of an optimizer with a state in 8 bits that are not shaped as their parameter, of n numbers.
_OF_BLOCKS: dict[str, Callable[[int], tuple[int]]] = {
    **dict.fromkeys(("qmap1", "qmap2"), lambda _: (_CODES,)),
    **dict.fromkeys(("absmax1", "absmax2"), lambda n: (-(-n // _BLOCK),)),
}


def save(optimizer: torch.optim.Optimizer, path: Path, model: Any = None) -> None:
    """Write the per-parameter state; of a model in shards the first process does it, in `sharding.leading`."""
    tensors = states(optimizer)
    if model is None or not sharding.is_sharded(model):
        save_file(_apart({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}), path)
        return
    tensor_files.write(path, tensors, lambda name: sharding.gathered(model, tensors[name]), of_torch=False)


def states(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the tensors of the state by name, in the same order in all processes."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": torch.as_tensor(value) for i, entry in state.items() for name, value in _flat(entry)}


def _flat(entry: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield a parameter's state; bitsandbytes keeps a part of it in a mapping inside."""
    for name, value in entry.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        else:
            yield name, value


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors that share no memory: parameters may share a table, of which safetensors writes none."""
    seen = set[int]()
    for name, tensor in tensors.items():
        tensors[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return tensors


def load(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Restore what `save` wrote into an optimizer over the same parameters.

    Raises:
        ModelError: it is of another model, or damaged.
    """
    state: dict[int, dict[str, Any]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    with reading(path):
        for name, tensor in _read(path, parameters).items():
            index, _, field = name.partition(".")
            shape = parameters[int(index)].shape
            expected = _OF_BLOCKS[field](shape.numel()) if field in _OF_BLOCKS else shape
            if tensor.ndim and tensor.shape != expected:
                raise ValueError(f"{name} is {tuple(tensor.shape)}, its parameter {tuple(shape)}")
            is_count = tensor.ndim == 0 and not tensor.is_floating_point()
            state.setdefault(int(index), {})[field] = int(tensor) if is_count else tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _read(path: Path, parameters: list[Any]) -> Mapping[str, Tensor]:
    if not any(sharding.is_shard(parameter) for parameter in parameters):
        whole: dict[str, Tensor] = load_file(path)
        return whole
    found: dict[str, Tensor] = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            like, part = parameters[int(name.partition(".")[0])], file.get_slice(name)
            if tuple(part.get_shape()) == tuple(like.shape):
                found[name] = shards.slice_of(like, lambda rows: part[rows].to(like.device))  # noqa: B023 - at once
            else:  # a number of its own, or what is refused
                found[name] = file.get_tensor(name)
    return found
