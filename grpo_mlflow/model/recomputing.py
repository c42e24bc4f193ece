"""Gradient checkpointing: less memory for activations, more work."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from grpo_mlflow.errors import ConfigError


def recompute_activations(model: Any) -> None:
    """Let each layer keep its input only, and run forward again in the backward pass (Chen et al. 2016).

    transformers does the same for models in training mode; this one stays in evaluation mode, dropout off.

    Raises:
        ConfigError: the model does not say what its layers are.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"model.gradient_checkpointing = true: {type(model).__name__} has no layers to recompute; allowed: false"
        )
    for layer in layers:
        layer.forward = _recomputed(layer.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run
