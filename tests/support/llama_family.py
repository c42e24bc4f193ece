"""Small models of the Llama family, in all the ways that a written-out pass must get right."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from grpo_mlflow.forward import tuning
from grpo_mlflow.forward.attention import allow_packing
from tests.support import small_models

SIZES = {**small_models.SIZES, "max_position_embeddings": 64}  # fewer than are asked for: dynamic angles change


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}


MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama, biases": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "llama, gelu": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, hidden_act="gelu")),
    "llama 3 angles": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LLAMA3)),
    "dynamic angles": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=DYNAMIC)),
    "wide heads": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, head_dim=16)),
    "wide vocabulary": lambda: LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": tuning.BLOCKED_FROM_ROWS})),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
}


def made(name: str) -> Any:
    """A model whose norms and biases are not those of a fresh one."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    assert allow_packing(model)
    return model
