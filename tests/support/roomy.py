"""A model with embeddings for more tokens than its tokenizer knows."""

from __future__ import annotations

from pathlib import Path

import torch

from grpo_mlflow.config import TinyConfig
from grpo_mlflow.model import policy, tiny
from grpo_mlflow.model.policy import Policy
from tests.support import broken

KNOWN, ROWS = 317, 325  # tokens of the tokenizer, and of the model


def save(folder: Path, *ends: int) -> Path:
    """Write a model with these tokens as ends, which its tokenizer does not name."""
    tiny.build(TinyConfig(hidden_size=16, layers=1, heads=2, seed=3)).save(folder)
    name = "model.embed_tokens.weight"
    more = 0.05 * torch.randn(ROWS - KNOWN, 16, generator=torch.Generator().manual_seed(0))
    broken.both(
        broken.changed(lambda tensors: tensors.update({name: torch.cat([tensors[name], more])})),
        broken.edited("config.json", vocab_size=ROWS, eos_token_id=list(ends), pad_token_id=None),
        broken.edited("generation_config.json", eos_token_id=list(ends), pad_token_id=None),
        broken.edited("tokenizer_config.json", eos_token=None, pad_token=None),
    )(folder)
    return folder


def load(folder: Path, *ends: int) -> Policy:
    """Return what `save` writes."""
    return policy.load(save(folder, *ends), torch.device("cpu"))
