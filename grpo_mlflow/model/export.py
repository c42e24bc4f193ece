"""A model's weights as a Hugging Face folder, also where the model is in shards: then tensor by tensor.

The first process holds no more than one tensor of the others' at a time, or one layer's adapter with its base.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from grpo_mlflow.errors import ConfigError
from grpo_mlflow.model import lora, merging, sharding, tensor_files


def require_plain_names(model: Any) -> None:
    """Refuse to shard a model whose files hold other tensors than it computes with, such as single experts.

    Raises:
        ConfigError: tensor by tensor, such files cannot be written.
    """
    held = {name: torch.empty_like(each, device="meta") for name, each in _tensors(model).items()}
    written = revert_weight_conversion(model, dict(held))
    if {name: each.shape for name, each in written.items()} != {name: each.shape for name, each in held.items()}:
        raise ConfigError(
            f"train.sharding = 'full': the files of {type(model).__name__} hold its weights in another form than it "
            "computes with (other names, fused layers, experts); allowed: none"
        )


def save(model: Any, folder: Path) -> None:
    """Write a model without an adapter."""
    if not sharding.is_sharded(model):
        model.save_pretrained(folder)
        return
    held = _tensors(model)
    _write(model, folder, held, lambda name: sharding.gathered(model, held[name]))


def save_adapter(model: Any, folder: Path) -> None:
    """Write the adapter of a model alone."""
    lora.save(model, folder, lambda each: sharding.gathered(model, each))


def save_merged(model: Any, folder: Path) -> None:
    """Write a model with its adapter added into its weights."""
    if not sharding.is_sharded(model):
        merging.merged(model, "cpu").save_pretrained(folder)
        return
    held = {_plain(name): each for name, each in _tensors(model).items() if not lora.is_adapters(name)}
    layers = lora.adapted_layers(model)

    def value(name: str) -> Tensor:
        parent, _, leaf = name.rpartition(".")
        if leaf != "weight" or parent not in layers:
            return sharding.gathered(model, held[name]).to(like[name].dtype)
        layer = layers[parent]
        # the layer's own copies of its tensors are replaced by whole ones, which the layer itself never holds
        memo = {
            id(each): nn.Parameter(sharding.gathered(model, each), requires_grad=False) for each in layer.parameters()
        }
        merged: Tensor = merging.merged_layer(parent, copy.deepcopy(layer, memo)).weight
        return merged

    # what is stored in fewer bits is written as the float32 that a merged model has
    like = {
        n: torch.empty_like(t, dtype=torch.float32, device="meta") if t.is_floating_point() else t
        for n, t in held.items()
    }
    _write(model, folder, like, value)
    config = copy.deepcopy(model.config)
    config.dtype = "float32"  # `save_pretrained` has noted the type in which the base is stored
    config.save_pretrained(folder)


def _write(model: Any, folder: Path, held: dict[str, Tensor], value: Callable[[str], Tensor]) -> None:
    model.save_pretrained(folder, state_dict={})  # all but the weights
    tensor_files.write(folder / "model.safetensors", held, value)


def _tensors(model: Any) -> dict[str, Tensor]:
    """Return the tensors that a model's file holds, tied ones once."""
    kept = dict(model.named_parameters())
    saved = model.state_dict()
    return kept | {name: each for name, each in model.named_buffers() if name in saved}


def _plain(name: str) -> str:
    return name.replace(".base_layer.", ".")
