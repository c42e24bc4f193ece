"""How processes share an optimizer step: each holds the whole model, or a shard of it.

With whole models (DDP, by accelerate) gradients are exchanged in the last backward pass of a step. With shards
(`model.sharding`) every pass gathers weights and leaves its gradient in the shards, so no process ever holds more, and
all must call the model equally often, without gradients too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from grpo_mlflow.model import sharding


class Parallel(Protocol):
    """What an update asks of it."""

    def prepare(self, model: Any, optimizer: Optimizer) -> tuple[Any, Any]:
        """Return the model to call in training, and the optimizer."""
        ...

    def accumulating(self, model: Any) -> AbstractContextManager[None]:
        """Backward passes inside the block are followed by others of the same step."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss to that of the step, which is the sum over all processes."""
        ...

    def passes(self, own: int) -> int:
        """Return how many forward passes this process has to make, without gradients, if `own` would do for it."""
        ...

    def clip(self, parameters: Iterable[Parameter], limit: float) -> float:
        """Scale the step's gradient down to a norm of `limit`, and return the norm that it had, over all processes."""
        ...

    def rest(self, model: Any) -> None:
        """End passes without gradients: all parameters are those that the optimizer holds."""
        ...


class Replicated:
    """Every process holds the whole model; one alone is such a process."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def prepare(self, model: Any, optimizer: Optimizer) -> tuple[Any, Any]:
        """See `Parallel`."""
        prepared, wrapped = self._accelerator.prepare(model, optimizer)
        return prepared, wrapped

    def accumulating(self, model: Any) -> AbstractContextManager[None]:
        """See `Parallel`."""
        block: AbstractContextManager[None] = self._accelerator.no_sync(model)
        return block

    def backward(self, loss: Tensor) -> None:
        """See `Parallel`; undoes accelerate's divisions by processes and steps, which the weights already count."""
        accelerator = self._accelerator
        accelerator.backward(loss * int(accelerator.num_processes * accelerator.gradient_accumulation_steps))

    def passes(self, own: int) -> int:
        """See `Parallel`."""
        return own

    def clip(self, parameters: Iterable[Parameter], limit: float) -> float:
        """See `Parallel`."""
        gradients = _gradients(parameters)
        return _scaled(gradients, _norm(gradients), limit)

    def rest(self, model: Any) -> None:
        """See `Parallel`."""


class Sharded:
    """Every process holds a shard of each parameter, of its gradient and of the optimizer's state."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def prepare(self, model: Any, optimizer: Optimizer) -> tuple[Any, Any]:
        """See `Parallel`."""
        return model, optimizer

    def accumulating(self, model: Any) -> AbstractContextManager[None]:
        """See `Parallel`; each pass leaves its gradient in the shards, or a whole one would stay in each process."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """See `Parallel`."""
        torch.autograd.backward(loss)

    def passes(self, own: int) -> int:
        """See `Parallel`."""
        return sharding.most(self._model, own)

    def clip(self, parameters: Iterable[Parameter], limit: float) -> float:
        """See `Parallel`."""
        gradients = [gradient.to_local() for gradient in _gradients(parameters)]
        squares = torch.tensor(_norm(gradients) ** 2, dtype=torch.float64, device=self._model.device)
        dist.all_reduce(squares)
        return _scaled(gradients, math.sqrt(squares), limit)

    def rest(self, model: Any) -> None:
        """See `Parallel`."""
        sharding.rest(model)


def _gradients(parameters: Iterable[Parameter]) -> list[Any]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _norm(gradients: Iterable[Tensor]) -> float:
    """Return the Euclidean norm of all numbers together.

    Rows come first: a CPU's float32 sum over a whole embedding is off by 1e-5 and more, and by less over a shard of it.
    """
    norms = [torch.linalg.vector_norm(torch.linalg.vector_norm(gradient, dim=-1)) for gradient in gradients]
    return math.hypot(*torch.stack(norms).tolist()) if norms else 0.0


def _scaled(gradients: Iterable[Tensor], norm: float, limit: float) -> float:
    """Scale gradients of this norm down to a norm of `limit`, and return the norm that they had."""
    if norm > limit:
        for gradient in gradients:
            gradient.mul_(limit / norm)
    return norm


def of(accelerator: Accelerator, model: Any) -> Parallel:
    """Return how the processes share a model."""
    return Sharded(model) if sharding.is_sharded(model) else Replicated(accelerator)
