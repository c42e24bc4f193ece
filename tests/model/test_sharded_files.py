"""What is written tensor by tensor, and what cannot be in shards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import MixtralConfig, MixtralForCausalLM

from grpo_mlflow.errors import ConfigError
from grpo_mlflow.model import export, shards, tensor_files
from tests.support import small_models


def test_a_file_written_tensor_by_tensor_is_that_of_the_library(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "b": torch.randn(3, 5),
        "a.weight": torch.randn(4).to(torch.bfloat16),
        "step": torch.tensor(7.0),
        "nothing": torch.zeros(0, 3),
        "ids": torch.arange(6).view(2, 3).T.contiguous(),
        'odd "name" é': torch.tensor([True, False]),
    }
    save_file(tensors, tmp_path / "library", metadata={"format": "pt"})
    asked: list[str] = []

    def value(name: str) -> torch.Tensor:
        asked.append(name)
        return tensors[name]

    tensor_files.write(tmp_path / "ours", tensors, value)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()
    assert sorted(asked) == sorted(tensors)  # each once


def test_models_that_cannot_be_in_shards_are_refused_in_one_line() -> None:
    experts = MixtralForCausalLM(MixtralConfig(**small_models.SIZES, num_local_experts=2))
    with pytest.raises(ConfigError, match=r"train.sharding = 'full': .*MixtralForCausalLM.*experts.*allowed: none"):
        export.require_plain_names(experts)
    with pytest.raises(ConfigError, match=r"train.sharding = 'full': Linear does not say what its layers are"):
        shards.layers_of(torch.nn.Linear(2, 2))
