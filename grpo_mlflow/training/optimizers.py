"""The optimizer that the config names."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import Parameter

from grpo_mlflow.config import TrainConfig
from grpo_mlflow.config.optimizers import options

Make = Callable[..., torch.optim.Optimizer]


def _adamw_8bit(parameters: Sequence[Parameter], **settings: Any) -> torch.optim.Optimizer:
    library: Any = importlib.import_module("bitsandbytes.optim")
    found: torch.optim.Optimizer = library.AdamW8bit(parameters, **settings)
    return found


# fused: one kernel for all parameters; a loop over them takes ten times as long
_MAKE: Mapping[str, Make] = {
    "adamw": partial(torch.optim.AdamW, fused=True),
    "sgd": partial(torch.optim.SGD, fused=True),
    "adamw8bit": _adamw_8bit,
}


def create(parameters: Sequence[Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimizer of these parameters, with its options."""
    own = options(config.optimizer, config.optimizer_options)
    make = partial(_MAKE[config.optimizer], lr=config.lr, weight_decay=config.weight_decay, **own)
    return Offloaded(parameters, make) if config.optimizer_offload == "cpu" else make(parameters)


class Offloaded(torch.optim.Optimizer):
    """An optimizer whose state lives in host memory, beside a copy of the weights; its step runs there.

    A step copies the gradients to the host and the new weights back, tensor by tensor. So a device holds weights and
    gradients only, and the result is that of `make` on the host.
    """

    def __init__(self, parameters: Sequence[Parameter], make: Make) -> None:
        self._weights = list(parameters)
        self._copies = [Parameter(weight.detach().to("cpu", copy=True)) for weight in self._weights]
        self._inner = make(self._copies)
        super().__init__(self._weights, dict(self._inner.defaults))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """See `torch.optim.Optimizer.step`; without a closure."""
        for outer, group in zip(self.param_groups, self._inner.param_groups, strict=True):
            group |= {name: value for name, value in outer.items() if name != "params"}  # the learning rate, above all
        for weight, copied in zip(self._weights, self._copies, strict=True):
            copied.grad = None if weight.grad is None else weight.grad.to("cpu")
        self._inner.step()
        for weight, copied in zip(self._weights, self._copies, strict=True):
            copied.grad = None
            weight.copy_(copied)

    def state_dict(self) -> dict[str, Any]:
        """Return the state on the host."""
        return self._inner.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state, and the weights as they are now."""
        self._inner.load_state_dict(dict(state_dict))
        with torch.no_grad():
            for weight, copied in zip(self._weights, self._copies, strict=True):
                copied.copy_(weight)
