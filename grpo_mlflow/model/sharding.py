"""Weights in shards: each process holds 1/N of every parameter, by torch's `fully_shard` (FSDP2).

A layer's weights are gathered when it computes, and let go afterwards; their gradients are summed straight into the
shards. So all processes must compute together, equally often. What one process does by itself needs more:

    whole(model)        all weights in every process inside the block, for any number of passes of each
    leading(model)      the first process works alone, and asks for single tensors (`gathered`), or all (`whole`)
    take_part(model)    what the others do meanwhile: they give their shards for what the first asks for

Inside `leading` no other exchange may take place, and an error of the first process lets the others go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from grpo_mlflow.errors import ConfigError, ModelError

_END, _TENSOR, _WHOLE, _SHARDED = range(4)  # words of the first process


class _Shards:
    """What this process knows of a model in shards, and of its optimizer's state (`states`)."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model, self._device = model, device
        self._known: list[Tensor] = []  # what the first process may ask for, by number
        self._numbers: dict[int, int] = {}
        self.states: Sequence[Tensor] = ()
        self.leads = self.is_whole = False

    def rest(self) -> None:
        """Let go of weights that a pass without gradients has left gathered, those outside of the layers."""
        if not self.is_whole:
            self._model.reshard()

    def begin(self) -> None:
        self.rest()
        self._known = [*self._model.parameters(), *self.states]
        self._numbers = {id(each): number for number, each in enumerate(self._known)}

    def tell(self, word: int, number: int = 0) -> None:
        dist.broadcast(torch.tensor([word, number], device=self._device), 0)

    def heard(self) -> tuple[int, int]:
        words = torch.zeros(2, dtype=torch.long, device=self._device)
        dist.broadcast(words, 0)
        word, number = words.tolist()
        return word, number

    def ask(self, tensor: DTensor) -> Tensor:
        assert self.leads, "only the first process asks, inside `leading`"
        number = self._numbers[id(tensor)]
        self.tell(_TENSOR, number)
        return self.gather(number)

    def gather(self, number: int) -> Tensor:
        """Return a tensor in full; every process has to call this."""
        found = self._known[number].detach()
        return found.full_tensor() if isinstance(found, DTensor) else found

    def unshard(self) -> None:
        self._model.set_reshard_after_forward(False, recurse=True)
        for part in _parts(self._model):
            part.unshard()
        self.is_whole = True

    def reshard(self) -> None:
        parts = _parts(self._model)
        for part in parts:  # those outside of the layers stay after a pass: its gradient would need them at once
            part.set_reshard_after_forward(part is not self._model, recurse=False)
        for part in parts:
            part.reshard()
        self.is_whole = False


_KNOWN: WeakKeyDictionary[Any, _Shards] = WeakKeyDictionary()


def is_sharded(model: Any) -> bool:
    return isinstance(model, FSDPModule)


def is_shard(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


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
        dtype: of the computation; gathered weights have it, gradients are summed in float32.
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
    for part in _parts(model):
        part.set_gradient_divide_factor(1.0)  # a sum, not a mean: weights of tokens count all processes' tokens
        part.set_force_sum_reduction_for_comms(True)  # gloo has no other
    _KNOWN[model] = _Shards(model, device)


def _shard(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    low = dtype != torch.float32
    # Autocast would keep a cast copy of all weights until the backward pass, and so undo the sharding.
    policy = MixedPrecisionPolicy(dtype, torch.float32) if low else MixedPrecisionPolicy()
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def _receive(model: Any, name: str, parameter: Any, device: torch.device) -> None:
    whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    dist.broadcast(whole, 0)
    own = slice_of(parameter, lambda rows: whole[rows].clone())
    _set(model, name, nn.Parameter(own, requires_grad=parameter.requires_grad))


def slice_of(like: Any, read: Any) -> DTensor:
    """Return a tensor in shards as those of `like`; `read` takes a slice of rows and returns those of the whole."""
    mesh = like.device_mesh
    count, most = mesh.size(), -(-like.shape[0] // mesh.size())  # as torch.chunk cuts
    start = min(mesh.get_local_rank() * most, like.shape[0])
    local = read(slice(start, min(start + most, like.shape[0])))
    assert count * most >= like.shape[0]
    return DTensor.from_local(
        local.contiguous(),
        mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def _set(model: Any, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    held = module._parameters if leaf in module._parameters else module._buffers
    held[leaf] = tensor


def _parts(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def rest(model: Any) -> None:
    """Let go of what a pass without gradients has left gathered: parameters are shards again, all of them."""
    if is_sharded(model):
        _KNOWN[model].rest()


def hold_states(model: Any, states: Callable[[], Sequence[Tensor]]) -> None:
    """Name the tensors of the optimizer's state that may be asked for next, in all processes in the same order."""
    if is_sharded(model):
        _KNOWN[model].states = states()


@contextmanager
def whole(model: Any) -> Iterator[None]:
    """Hold all weights in every process inside the block, so that each may compute by itself, without gradients.

    All processes call this together, or the first alone inside `leading`.
    """
    if not is_sharded(model) or _KNOWN[model].is_whole:
        yield
        return
    shards = _KNOWN[model]
    if shards.leads:
        shards.tell(_WHOLE)
    shards.unshard()
    try:
        yield
    finally:
        shards.reshard()
        if shards.leads:
            shards.tell(_SHARDED)


def require_whole(model: Any) -> None:
    """Refuse a pass of this process alone while the others hold a part of the weights: it would wait for ever."""
    assert not is_sharded(model) or _KNOWN[model].is_whole, "a model in shards computes alone in `whole` only"


def leading(model: Any) -> AbstractContextManager[None]:
    """Let the first process work alone inside the block, while the others `take_part`."""
    return _led(_KNOWN[model]) if is_sharded(model) and not _KNOWN[model].leads else nullcontext()


@contextmanager
def _led(shards: _Shards) -> Iterator[None]:
    shards.begin()
    shards.leads = True
    try:
        yield
    except BaseException:
        with suppress(RuntimeError):  # another process may be what is gone
            shards.tell(_END)
        raise
    else:
        shards.tell(_END)
    finally:
        shards.leads = False


def take_part(model: Any) -> None:
    """Do what the first process asks for in its `leading` block, until that ends."""
    if not is_sharded(model):
        return
    shards = _KNOWN[model]
    shards.begin()
    while True:
        word, number = shards.heard()
        if word == _END:
            return
        if word == _TENSOR:
            shards.gather(number)
        elif word == _WHOLE:
            shards.unshard()
        else:
            shards.reshard()


def is_first(model: Any) -> bool:
    """Return whether this process writes what a model's processes have to write; one of one does."""
    return not is_sharded(model) or dist.get_rank() == 0


def gathered(model: Any, tensor: Tensor) -> Tensor:
    """Return a parameter of the model, or one of `hold_states`, in full: of one in shards inside `leading` only."""
    return _KNOWN[model].ask(tensor) if isinstance(tensor, DTensor) else tensor.detach()


def may_ask(model: Any) -> bool:
    """Return whether `gathered` and `whole` can be used by this process alone now."""
    return not is_sharded(model) or _KNOWN[model].leads
