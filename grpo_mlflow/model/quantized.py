"""A base model of adapters whose linear layers are stored in 4 bits (QLoRA: Dettmers et al. 2023, arXiv 2305.14314).

transformers reads and packs the weights, with bitsandbytes; the layers are then ours (`forward.layers`).
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from grpo_mlflow.forward.layers import StoredLinear

# It warns of kernels that a CPU lacks, when it is imported: by peft, say, wherever it is installed.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def arguments(in_4_bits: bool, device: torch.device) -> dict[str, Any]:
    """Return what `from_pretrained` must be told."""
    if not in_4_bits:
        return {}
    chosen = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return {"quantization_config": chosen, "device_map": {"": str(device)}}


def take_over(model: Any) -> None:
    """Put our layers in the place of those of bitsandbytes, and let the model be like any other.

    On a processor with AVX512-BF16, Linear4bit packs its weight anew in the first pass without gradients of a model in
    evaluation mode, as ours always are; from then on nothing below it gets a gradient, without a word. And it computes
    in the type that it first met, not in that of autocast.
    """
    library: Any = importlib.import_module("bitsandbytes")
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, library.nn.Linear4bit):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, _ours(layer))
    # transformers would refuse to move and to save it, and peft would choose layers for Linear4bit
    del model.config.quantization_config, model.quantization_method, model.hf_quantizer
    model.is_quantized = model.is_loaded_in_4bit = False


def _ours(layer: Any) -> StoredLinear:
    found = StoredLinear(layer.in_features, layer.out_features, bias=False, device="meta")
    found.weight, found.bias = layer.weight, layer.bias
    return found
