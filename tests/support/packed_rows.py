"""Models and rows in every shape that packing meets."""

from __future__ import annotations

import random
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from grpo_mlflow.model.policy import Policy
from grpo_mlflow.training.batching import Row
from grpo_mlflow.training.scoring import Scorer
from tests.support.small_models import SIZES

MODELS: dict[str, Any] = {
    "qwen2": lambda **kw: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True, **kw)),
    "llama": lambda **kw: LlamaForCausalLM(LlamaConfig(**SIZES, **kw)),
    "qwen3": lambda **kw: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8, **kw)),
    "gpt2": lambda **kw: GPT2LMHeadModel(
        GPT2Config(vocab_size=200, n_embd=48, n_layer=3, n_head=6, bos_token_id=1, eos_token_id=2, **kw)
    ),
}


# what all prompts begin with, the lengths of their rests, and for each prompt the lengths of its completions
SHAPES: dict[str, tuple[int, list[int], list[list[int]]]] = {
    "ragged": (0, [3, 9, 1, 6], [[4, 1, 7], [2, 2], [5], [1, 8, 3]]),
    "equal": (0, [5, 5], [[4, 4, 4], [4, 4, 4]]),
    "long": (0, [3, 66], [[4, 100], [60, 1]]),  # long enough for attention by another way
    "one token each": (0, [4, 2], [[1, 1], [1]]),
    "alike, ragged": (11, [3, 9, 1, 6], [[4, 1, 7], [2, 2], [5], [1, 8, 3]]),
    "alike, equal": (16, [5, 5], [[4, 4, 4], [4, 4, 4]]),
    "alike, long": (20, [64, 3], [[40, 4], [40]]),
    "alike, one token each": (17, [1, 1], [[1, 1], [1]]),
}


def build(name: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    return MODELS[name](**settings).eval()


def scorer(model: Any, temperature: float = 0.7, dtype: torch.dtype = torch.float32) -> Scorer:
    return Scorer(Policy(model, None, torch.device("cpu"), dtype, (2,), 0), temperature)


def rows(shape: str) -> list[Row]:
    rng = random.Random(0)
    alike, rests, completions = SHAPES[shape]
    beginning = tuple(rng.randrange(3, 200) for _ in range(alike))
    found = []
    for length, group in zip(rests, completions, strict=True):
        prompt = beginning + tuple(rng.randrange(3, 200) for _ in range(length))
        for size in group:
            found.append(Row(prompt, tuple(rng.randrange(3, 200) for _ in range(size)), (0.0,) * size, 0.0, False))
    rng.shuffle(found)
    return found
