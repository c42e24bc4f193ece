"""An optimizer's state on disk: `<parameter index>.<name>` in a safetensors file, also of a model in shards.

A sharded one is gathered, and read, tensor by tensor: each process reads the rows that are its own, whatever number of
processes wrote the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from grpo_mlflow.model import sharding, shards, tensor_files
from grpo_mlflow.model.sharding import Part
from grpo_mlflow.training import eight_bits
from grpo_mlflow.training.checkpoint import reading


def save(optimizer: torch.optim.Optimizer, path: Path, model: Any = None) -> None:
    """Write the per-parameter state; of a model in shards the first process does it, in `sharding.leading`.

    There, `sharding.hold_states` has named it.
    """
    if model is None or not sharding.is_sharded(model):
        tensors = {name: torch.as_tensor(value) for name, _, value in _entries(optimizer)}
        save_file(_apart({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}), path)
        return
    held = sharding.states(model)
    like = {name: _in_file(held, name) for name in held}
    tensor_files.write(path, like, lambda name: _whole(model, held, name), of_torch=False)


def states(optimizer: torch.optim.Optimizer) -> dict[str, Tensor | Part]:
    """Return what this process holds of the state of shards, by name, in the same order in all processes."""
    found = dict[str, Tensor | Part]()
    for name, parameter, value in _entries(optimizer):
        tensor, field = torch.as_tensor(value), name.partition(".")[2]
        if not sharding.is_shard(parameter) or not tensor.ndim or field.startswith("qmap"):
            found[name] = tensor
        elif field in eight_bits.OF_BLOCKS:  # scales, of a share as large as the largest
            most = eight_bits.blocks(_share(parameter))
            filled = torch.nn.functional.pad(tensor, (0, most - len(tensor)))
            found[name] = Part(filled, parameter, torch.Size([most * parameter.device_mesh.size()]))
        else:
            found[name] = Part(tensor, parameter, parameter.shape)
    return found


def _entries(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, parameter and value of all that the state holds."""
    parameters = _parameters(optimizer)
    for index, entry in optimizer.state_dict()["state"].items():
        for name, value in _flat(entry):
            yield f"{index}.{name}", parameters[index], value


def _parameters(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _flat(entry: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield a parameter's state; bitsandbytes keeps a part of it in a mapping inside."""
    for name, value in entry.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        else:
            yield name, value


def _share(parameter: Any) -> int:
    """Return how many numbers of a parameter in shards each process holds, but for the last ones."""
    return int(shards.most_rows(parameter) * _width(parameter))


def _width(parameter: Any) -> int:
    return int(parameter.numel() // parameter.shape[0])


def _in_file(held: Mapping[str, Tensor | Part], name: str) -> Tensor:
    """Return a tensor without numbers of the type and shape that a file has."""
    found, field = held[name], name.partition(".")[2]
    if not isinstance(found, Part):
        return torch.empty_like(found, device="meta")
    whole = field in eight_bits.OF_BLOCKS
    shape = eight_bits.OF_BLOCKS[field](found.like.numel()) if whole else found.shape
    return torch.empty(shape, dtype=found.own.dtype, device="meta")


def _whole(model: Any, held: Mapping[str, Tensor | Part], name: str) -> Tensor:
    """Return a tensor of the file, from all processes."""
    index, _, field = name.partition(".")
    codes, scales, meaning = (f"{index}.{kind}{field[-1]}" for kind in ("state", "absmax", "qmap"))
    part = held[name]
    if scales not in held or not isinstance(part, Part):
        return sharding.gathered(model, part)
    share = _share(part.like)
    if share % eight_bits.BLOCK == 0:
        return sharding.gathered(model, part)[: len(_in_file(held, name))]
    shown, own, numbers = (sharding.gathered(model, held[each]) for each in (codes, scales, meaning))
    own = own.view(part.like.device_mesh.size(), -1)
    both = eight_bits.joined(shown.reshape(-1), own, numbers.to(own.device), share)
    return both[0].view(part.like.shape) if name == codes else both[1]


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
    parameters = _parameters(optimizer)
    with reading(path), safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            index, _, field = name.partition(".")
            found = _read(file, name, parameters[int(index)])
            is_count = found.ndim == 0 and not found.is_floating_point()
            # In host memory: the optimizer moves what belongs on a device, and an offloaded state would not fit there.
            state.setdefault(int(index), {})[field] = int(found) if is_count else found
    for index, entry in state.items():
        if sharding.is_shard(parameters[index]):
            _cut(entry, parameters[index])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _read(file: Any, name: str, like: Any) -> Tensor:
    """Return a tensor of a file, of one that is shaped as its parameter in shards the rows of this process."""
    field = name.partition(".")[2]
    part = file.get_slice(name)
    shape, of_parameter = tuple(part.get_shape()), field not in eight_bits.OF_BLOCKS
    if shape and shape != (tuple(like.shape) if of_parameter else eight_bits.OF_BLOCKS[field](like.numel())):
        raise ValueError(f"{name} is {shape}, its parameter {tuple(like.shape)}")
    if shape and of_parameter and sharding.is_shard(like):
        rows: Tensor = part[shards.rows_of(like)]
        return rows
    whole: Tensor = file.get_tensor(name)
    return whole


def _cut(entry: dict[str, Any], parameter: Any) -> None:
    """Let moments in 8 bits of this process's rows begin their blocks with them."""
    start = shards.rows_of(parameter).start * _width(parameter)
    for scales in [field for field in entry if field.startswith("absmax")]:
        codes, meaning = f"state{scales[-1]}", entry[f"qmap{scales[-1]}"]
        shape = entry[codes].shape
        own, entry[scales] = eight_bits.cut(entry[codes].reshape(-1), entry[scales], meaning, start)
        entry[codes] = own.view(shape)
