"""A decoding step written out gives the logits of the model, and stands aside where it would not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
)

from grpo_mlflow.config import LoraConfig
from grpo_mlflow.forward.attention import packed_forward
from grpo_mlflow.forward.llama_step import LlamaStep
from grpo_mlflow.forward.prefix_tree import Level, Tree
from grpo_mlflow.generation.local import ways
from grpo_mlflow.model import lora
from grpo_mlflow.model.policy import Policy
from tests.support.llama_family import MODELS, SIZES, made


@torch.no_grad()
def both(model: Any, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    tree = Tree([Level([ids])], model.device)
    return LlamaStep(model)(tree.ids, tree.positions, tree, 0), packed_forward(model, tree.ids, tree.positions, tree, 0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("count", [1, 100])
def test_gives_what_the_model_gives(name: str, count: int) -> None:
    model = made(name)
    found, expected = both(model, torch.randint(200, (count,)).tolist())
    assert found.shape == (count, model.config.vocab_size)
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


class Largest(TorchDispatchMode):
    """Notes the most elements that an operation's result has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            self.elements = max(self.elements, found.numel())
        return found


@torch.no_grad()
def test_scores_of_long_prompts_are_never_held() -> None:
    model = made("llama")
    tree = Tree([Level([[5] * 300, [6] * 300])], model.device)  # equal lengths: nothing is moved to be padded
    with Largest() as largest:
        LlamaStep(model)(tree.ids, tree.positions, tree, torch.tensor([299, 599]))
    assert 600 * 48 <= largest.elements < 2 * 300 * 300


def test_adapters_count() -> None:
    pytest.importorskip("peft")
    model = made("llama")
    lora.add(model, LoraConfig(rank=4, alpha=8), 0)
    plain, _ = both(model, [5, 6, 7])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    found, expected = both(model, [5, 6, 7])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found - plain).abs().max() > 0.1
    with lora.switched_off(model):
        torch.testing.assert_close(both(model, [5, 6, 7])[0], plain)


def sampler(model: Any) -> ways.Sampler:
    return ways.sampler(Policy(model, None, model.device, torch.float32, (2,), 0))


def test_other_families_go_through_their_modules() -> None:
    alike = made("llama")
    assert sampler(alike) == ways.Sampler("packed", written_out=True)
    alike = made("llama")
    alike.config.model_type = "no_llama"  # may differ where a few tokens cannot tell
    assert not sampler(alike).written_out
    sizes = {**SIZES, "embedding_multiplier": 2.0}  # layers with the same names that compute something else
    assert not sampler(GraniteForCausalLM(GraniteConfig(**sizes)).eval()).written_out


def test_what_disagrees_is_not_used() -> None:
    model = made("llama")
    model.model.layers[1].mlp.register_forward_hook(lambda module, given, found: 2 * found)
    assert sampler(model) == ways.Sampler("packed", written_out=False)


def test_what_lacks_the_modules_is_not_used() -> None:
    model = made("llama")
    mlp = model.model.layers[0].mlp
    mlp.up = mlp.up_proj
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up(x))
    del mlp.up_proj
    assert sampler(model) == ways.Sampler("packed", written_out=False)
