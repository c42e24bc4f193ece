"""The forward pass that is written out for the update: the numbers and gradients of the model, or it stands aside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from grpo_mlflow.config import LoraConfig
from grpo_mlflow.forward import llama_pass, shared_prefix, ways
from grpo_mlflow.forward.attention import packed_forward
from grpo_mlflow.forward.prefix_tree import Level, Tree
from grpo_mlflow.model import lora
from grpo_mlflow.model.recomputing import recompute_activations
from tests.support.llama_family import MODELS, made

# tokens of padding (0) are no fillers here: their embedding has a gradient only where the model gives it one
TREE = [Level([[5, 6, 0, 7], [8, 9]]), Level([[0, 10, 11], [12, 0], [13]], [0, 0, 1])]
PICKS = torch.tensor([3, 5, 6, 7, 9, 11])
SERVED = [name for name in MODELS if name != "llama, gelu"]


def with_adapter() -> Any:
    pytest.importorskip("peft")
    model = made("qwen2")
    lora.add(model, LoraConfig(rank=4, alpha=8), 0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return model


def gradients(model: Any, hidden: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    coefficients = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1), dtype=hidden.dtype)
    (hidden * coefficients).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", [*SERVED, "qwen2 with an adapter"])
def test_gives_what_the_model_gives_and_its_gradients(name: str) -> None:
    model = (made(name) if name in MODELS else with_adapter()).double()
    assert llama_pass.serves(model)
    tree = Tree(TREE, model.device)
    head = model.get_output_embeddings()
    with shared_prefix._Head(head) as taken:
        packed_forward(model, tree.ids, tree.positions, tree, PICKS)
    assert taken.hidden is not None
    expected = taken.hidden[0]
    found = llama_pass.hidden_states(model, tree.ids, tree.positions, tree, PICKS)
    torch.testing.assert_close(found, expected, atol=5e-6, rtol=0)  # transformers' norms round to float32
    theirs, ours = gradients(model, expected), gradients(model, found)
    assert theirs.keys() == ours.keys()
    assert len(theirs) > 20
    for key, gradient in theirs.items():
        assert (gradient - ours[key]).norm() <= 1e-5 * max(1.0, gradient.norm()), key


def test_each_gradient_is_that_of_its_function() -> None:
    torch.manual_seed(0)
    rows, heads, weight = torch.randn(5, 6), torch.randn(5, 2, 6), torch.rand(6)
    angle = torch.randn(5, 1, 3).repeat(1, 1, 2)
    sin = torch.cat([-angle[..., :3].sin(), angle[..., 3:].sin()], dim=-1)
    cases: list[tuple[Any, list[Any], int]] = [
        (llama_pass._Normed, [rows, weight, 1e-3], 2),
        (llama_pass._Turned, [heads, angle.cos(), sin], 1),
        (llama_pass._Gated, [rows, torch.randn(5, 6)], 2),
    ]
    for function, given, differentiable in cases:
        doubled = [part.double() if isinstance(part, Tensor) else part for part in given]
        inputs = [part.requires_grad_() if i < differentiable else part for i, part in enumerate(doubled)]
        assert torch.autograd.gradcheck(function.apply, inputs)


def test_it_is_used_for_log_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("llama")

    def broken(*_: Any) -> Tensor:
        raise AssertionError("through the model's modules")

    monkeypatch.setattr(model, "forward", broken)
    batch = shared_prefix.Prefixes([[5, 6]], [[7, 8], [9]], [0, 0], model.device)
    chosen, _ = shared_prefix.logprobs(model, batch, 1.0, written_out=True)
    assert bool((chosen[batch.mask] < 0).all())


def test_it_stands_aside_where_it_does_not_serve() -> None:
    other = GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    assert not llama_pass.serves(GPT2LMHeadModel(other).eval())
    assert not llama_pass.serves(made("llama, gelu"))
    model = made("llama")
    assert llama_pass.serves(model)
    assert not llama_pass.serves(torch.nn.ModuleDict({"module": model}))  # as it is wrapped for several processes
    with torch.autocast("cpu", torch.bfloat16):
        assert not llama_pass.serves(model)
    assert not llama_pass.serves(model.train())
    recompute_activations(model.eval())
    assert not llama_pass.serves(model)


class Renamed(torch.nn.Module):
    """As a model of somebody's own may be: the family's name, other names inside."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.body, self.config, self.device = inner, inner.config, inner.device


def test_other_models_with_the_name_of_the_family_keep_their_own_way() -> None:
    inner = made("llama")
    assert not llama_pass.serves(Renamed(inner).eval())
    assert not llama_pass.is_exact(inner.half())  # norms would be computed in half precision


def test_what_disagrees_is_not_used() -> None:
    model = made("llama")
    model.model.layers[1].mlp.register_forward_hook(lambda module, given, found: 2 * found)
    assert ways.scoring(model) == ways.Scoring("packed", written_out=False)
