"""A plain model of one with an adapter: the adapter added into its weights, layer by layer."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from grpo_mlflow.errors import ModelError
from grpo_mlflow.forward import layers
from grpo_mlflow.model.lora import NAME, adapted_layers

_TOKENS = 8  # on which a merged layer is compared with the one that it replaces
_NOISE = 256  # times the spacing of the weights' type: what sums of thousands of products may differ by


@torch.no_grad()
def merged(model: Any, device: torch.device | str | None = None) -> Any:
    """Return a plain float32 model with the adapter added into its weights, on `device` (null: where they are).

    Weights without an adapter are shared with `model`, which stays as it is; those in fewer bits are converted. Each
    merged layer is compared with the one that it replaces; as all else is the same, the models are then equal.

    Raises:
        ModelError: a merged layer computes something else than the layer with its adapter.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    plain = copy.deepcopy(model, shared)
    for name, layer in adapted_layers(plain).items():
        linear = merged_layer(name, layer)
        linear.weight.data = linear.weight.data.to(device or linear.weight.device)
        parent, _, attribute = name.rpartition(".")
        setattr(plain.get_submodule(parent), attribute, linear)
    layers.unstore(plain, device)
    del plain.peft_config
    return plain


@torch.no_grad()
def merged_layer(name: str, layer: Any) -> Any:
    """Return a layer's linear layer in float32 with its adapter added into the weights; it may be changed in place.

    Raises:
        ModelError: it computes something else than the layer with its adapter.
    """
    linear = layer.get_base_layer()
    tokens = _hidden_states(layer)
    before, expected = linear(tokens), layer(tokens)
    if isinstance(linear, layers.StoredLinear):
        linear = linear.dense()
    weight = linear.weight + layer.get_delta_weight(NAME).to(linear.weight.dtype)
    linear.weight = nn.Parameter(weight)
    scale = max(float(before.abs().max()), float((expected - before).abs().max()))
    error = float((linear(tokens) - expected).abs().max())
    if not error <= _NOISE * torch.finfo(weight.dtype).eps * scale:  # NaN is refused, too
        raise ModelError(
            f"the adapter of {name!r} cannot be merged: the merged layer is {error:.1g} off where its outputs are "
            f"{scale:.1g}, more than rounding makes; allowed: an adapter that adds to the weights alone"
        )
    return linear


def _hidden_states(layer: Any) -> Tensor:
    """Return what a layer takes for a few tokens, drawn the same each time: (tokens, in features)."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(_TOKENS, layer.in_features, generator=generator)
    return drawn.to(layer.get_base_layer().weight.device)
