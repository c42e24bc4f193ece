"""The optimizer that the config names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from grpo_mlflow.config import TrainConfig
from grpo_mlflow.config.optimizers import options
from grpo_mlflow.model import sharding
from grpo_mlflow.training import eight_bits

Make = Callable[..., torch.optim.Optimizer]
"""Takes the tensors to change, and those of which they are shares or copies."""


def _plain(kind: Make, held: Sequence[Parameter], _: Any, **settings: Any) -> torch.optim.Optimizer:
    return kind(held, fused=True, **settings)  # one kernel for all parameters; a loop over them takes ten times as long


_MAKE: Mapping[str, Make] = {
    "adamw": partial(_plain, torch.optim.AdamW),
    "sgd": partial(_plain, torch.optim.SGD),
    "adamw8bit": eight_bits.create,
}


def create(parameters: Sequence[Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimizer of these parameters, with its options."""
    own = options(config.optimizer, config.optimizer_options)
    make = partial(_MAKE[config.optimizer], lr=config.lr, weight_decay=config.weight_decay, **own)
    on_host = config.optimizer_offload == "cpu"
    if on_host or any(sharding.is_shard(each) for each in parameters):
        return Apart(parameters, make, on_host=on_host)
    return make(parameters, parameters)


class Apart(torch.optim.Optimizer):
    """An optimizer that knows plain tensors only: this process's shards of the weights, or copies in host memory.

    With `on_host` its state lives there, beside a copy of the weights (of shards, those of this process), and its step
    runs there: it copies the gradients to the host and the new weights back, tensor by tensor. So a device holds
    weights and gradients only, and the result is that of `make` on the host.
    """

    def __init__(self, parameters: Sequence[Parameter], make: Make, *, on_host: bool) -> None:
        self._weights, self._on_host = list(parameters), on_host
        self.held = [Parameter(self._taken(weight)) for weight in self._weights]
        self._inner = make(self.held, self._weights)
        super().__init__(self._weights, dict(self._inner.defaults))

    def _taken(self, weight: Tensor) -> Tensor:
        own = sharding.local(weight)
        return own.to("cpu", copy=True) if self._on_host else own

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """See `torch.optim.Optimizer.step`; without a closure."""
        for outer, group in zip(self.param_groups, self._inner.param_groups, strict=True):
            group |= {name: value for name, value in outer.items() if name != "params"}  # the learning rate, above all
        for weight, held in zip(self._weights, self.held, strict=True):
            if not self._on_host:  # shards may have moved since the last step
                held.data = sharding.local(weight)
            held.grad = None if weight.grad is None else sharding.local(weight.grad).to(held.device)
        self._inner.step()
        for weight, held in zip(self._weights, self.held, strict=True):
            held.grad = None
            if self._on_host:
                sharding.local(weight).copy_(held)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, of shards that of this process."""
        return self._inner.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state, and the weights as they are now."""
        self._inner.load_state_dict(dict(state_dict))
        with torch.no_grad():
            for weight, held in zip(self._weights, self.held, strict=True):
                held.data = self._taken(weight)
