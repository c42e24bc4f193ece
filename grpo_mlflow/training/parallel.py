"""How processes share an optimizer step: each holds the whole model, or a shard of it.

With whole models (DDP, by accelerate) gradients are exchanged in the last backward pass of a step. With shards
(`model.sharding`) every pass gathers weights and leaves its gradient in the shards, so no process ever holds more, and
all must call the model equally often, without gradients too.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
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
        return float(self._accelerator.clip_grad_norm_(parameters, limit))

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
        norm: Any = torch.nn.utils.clip_grad_norm_(parameters, limit)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def rest(self, model: Any) -> None:
        """See `Parallel`."""
        sharding.rest(model)


def of(accelerator: Accelerator, model: Any) -> Parallel:
    """Return how the processes share a model."""
    return Sharded(model) if sharding.is_sharded(model) else Replicated(accelerator)
