"""Weights in shards: each process holds 1/N of every parameter, by torch's `fully_shard` (FSDP2).

A layer's weights are gathered when it computes, and let go afterwards; their gradients are summed straight into the
shards. So all processes must compute together, equally often. What one process does by itself needs more:

    whole(model)        all weights in every process inside the block, for any number of passes of each
    leading(model)      the first process works alone, and asks for single tensors (`gathered`), or all (`whole`)
    take_part(model)    what the others do meanwhile: they give their shards for what the first asks for

How a model comes into shards is in `shards`.

Inside `leading` no other exchange may take place, and an error of the first process lets the others go.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from grpo_mlflow.runtime import interrupts

_END, _TENSOR, _WHOLE, _SHARDED = range(4)  # words of the first process


class NotLeading(Exception):
    """A tensor in shards was asked for outside of `leading`."""


def shard_of(own: Tensor, like: DTensor, shape: torch.Size) -> DTensor:
    """Return the tensor of `shape` of which this process has the rows `own`, shared out as `like`."""
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(own, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)


@dataclass(frozen=True, slots=True)
class Part:
    """What this process has of a tensor of `shape`, on any device; the processes have its rows as those of `like`."""

    own: Tensor
    like: DTensor
    shape: torch.Size

    def whole(self, device: torch.device) -> Tensor:
        """Return all rows, on a device of those processes; every process has to call this."""
        return shard_of(self.own.detach().to(device), self.like, self.shape).full_tensor()


class _Shards:
    """What this process knows of a model in shards, and of its optimizer's state (`states`)."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model, self._device = model, device
        self._known: list[Tensor | Part] = []  # what the first process may ask for, by number
        self._numbers: dict[int, int] = {}
        self.states: Mapping[str, Tensor | Part] = MappingProxyType({})
        self.leads = self.is_whole = False
        self._asking = threading.RLock()  # several threads of the first process may ask

    def rest(self) -> None:
        """Let go of weights that a pass without gradients has left gathered, those outside of the layers."""
        if not self.is_whole:
            self._model.reshard()

    def begin(self) -> None:
        self.rest()
        self._known = [*self._model.parameters(), *self.states.values()]
        self._numbers = {id(each): number for number, each in enumerate(self._known)}

    def tell(self, word: int, number: int = 0) -> None:
        dist.broadcast(torch.tensor([word, number], device=self._device), 0)

    def heard(self) -> tuple[int, int]:
        words = torch.zeros(2, dtype=torch.long, device=self._device)
        dist.broadcast(words, 0)
        word, number = words.tolist()
        return word, number

    def most(self, own: int) -> int:
        found = torch.tensor([own], device=self._device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def ask(self, tensor: DTensor | Part) -> Tensor:
        with self.uninterrupted():
            if not self.leads:
                raise NotLeading("the other processes are busy with something else than giving their shards")
            number = self._numbers[id(tensor)]
            self.tell(_TENSOR, number)
            return self.gather(number)

    @contextmanager
    def uninterrupted(self) -> Iterator[None]:
        """Tell the others a word and do the same: a signal between the two would leave them waiting."""
        with self._asking, interrupts.deferred():
            yield

    def gather(self, number: int) -> Tensor:
        """Return a tensor in full; every process has to call this."""
        found = self._known[number]
        if isinstance(found, Part):
            return found.whole(self._device)
        found = found.detach()
        return found.full_tensor() if isinstance(found, DTensor) else found

    def unshard(self) -> None:
        self._model.set_reshard_after_forward(False, recurse=True)
        for part in parts(self._model):
            part.unshard()
        self.is_whole = True

    def reshard(self) -> None:
        # first, since in a pass that a signal has ended in the middle a part stays gathered that would do so after one
        self._model.set_reshard_after_forward(True, recurse=True)
        for part in parts(self._model):
            part.reshard()
        # those outside of the layers stay after a pass: its gradient needs them at once
        self._model.set_reshard_after_forward(False, recurse=False)
        self.is_whole = False


_KNOWN: WeakKeyDictionary[Any, _Shards] = WeakKeyDictionary()


def know(model: Any, device: torch.device) -> None:
    """Note that a model is in shards."""
    _KNOWN[model] = _Shards(model, device)


def is_sharded(model: Any) -> bool:
    return isinstance(model, FSDPModule)


def is_shard(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, in the same memory."""
    found = tensor.detach()
    return found.to_local() if isinstance(found, DTensor) else found


def parts(model: Any) -> list[Any]:
    """Return what is gathered together: the layers, and the model for what is outside of them."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def rest(model: Any) -> None:
    """Let go of what a pass without gradients has left gathered: parameters are shards again, all of them."""
    if is_sharded(model):
        _KNOWN[model].rest()


def hold_states(model: Any, states: Callable[[], Mapping[str, Tensor | Part]]) -> None:
    """Name the tensors of the optimizer's state that may be asked for next, in all processes in the same order."""
    if is_sharded(model):
        _KNOWN[model].states = states()


def states(model: Any) -> Mapping[str, Tensor | Part]:
    """Return what this process holds of the tensors that `hold_states` has named."""
    return _KNOWN[model].states


def most(model: Any, own: int) -> int:
    """Return how many passes this process has to make if `own` would do for it: all of a model in shards make as many.

    Its processes call this together.
    """
    return _KNOWN[model].most(own) if is_sharded(model) else own


@contextmanager
def whole(model: Any) -> Iterator[None]:
    """Hold all weights in every process inside the block, so that each may compute by itself, without gradients.

    All processes call this together, or the first alone inside `leading`.
    """
    if not is_sharded(model) or _KNOWN[model].is_whole:
        yield
        return
    shards = _KNOWN[model]
    try:
        with shards.uninterrupted():
            if shards.leads:
                shards.tell(_WHOLE)
            shards.unshard()
        yield
    finally:
        with shards.uninterrupted():
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
        with suppress(RuntimeError), shards.uninterrupted():  # another process may be what is gone
            shards.leads = False
            shards.tell(_END)
        raise
    with shards.uninterrupted():
        shards.leads = False
        shards.tell(_END)


def take_part(model: Any) -> None:
    """Do what the first process asks for in its `leading` block, until that ends."""
    if not is_sharded(model):
        return
    shards = _KNOWN[model]
    with interrupts.deferred():  # who leaves between a word and the deed lets the first wait for ever
        shards.begin()
        while (heard := shards.heard())[0] != _END:
            word, number = heard
            if word == _TENSOR:
                shards.gather(number)
            elif word == _WHOLE:
                shards.unshard()
            else:
                shards.reshard()


def is_first(model: Any) -> bool:
    """Return whether this process writes what a model's processes have to write; one of one does."""
    return not is_sharded(model) or dist.get_rank() == 0


def gathered(model: Any, tensor: Tensor | Part) -> Tensor:
    """Return a parameter of the model, or one of its `states`, in full.

    Raises:
        NotLeading: it is in shards, and this is no `leading` block.
    """
    return _KNOWN[model].ask(tensor) if isinstance(tensor, (DTensor, Part)) else tensor.detach()
