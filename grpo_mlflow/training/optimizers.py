"""The optimizer that the config names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import Parameter

from grpo_mlflow.config import TrainConfig
from grpo_mlflow.config.optimizers import options

_MAKE: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


def create(parameters: Sequence[Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimizer of these parameters, with its options."""
    own = options(config.optimizer, config.optimizer_options)
    # fused: one kernel for all parameters; a loop over them takes ten times as long
    return _MAKE[config.optimizer](parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True, **own)
