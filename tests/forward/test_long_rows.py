"""Long completions: the numbers of the plain pass, in memory that grows with the tokens and not with their square."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_mlflow.forward import tuning
from grpo_mlflow.training.batching import Row
from tests.support.packed_rows import scorer
from tests.support.small_models import SIZES

VOCABULARY = int(SIZES["vocab_size"])


class Largest(TorchDispatchMode):
    """Notes the most numbers in a tensor that an operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        sizes = [part.numel() for part in tree_leaves(result) if isinstance(part, Tensor)]
        self.numbers = max(self.numbers, *sizes, 0)
        return result


def model(positions: int) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(**{**SIZES, "max_position_embeddings": positions, "num_hidden_layers": 1})
    ).eval()


def ids(count: int, seed: int) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(3, VOCABULARY) for _ in range(count))


def test_no_tensor_grows_with_the_square_of_a_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "ALONE_FROM_TOKENS", 256)
    made, found = scorer(model(2048)), {}
    for tokens in (256, 1024):
        rows = [Row(ids(7, 1), ids(tokens, 2), (), 0.0, False), Row(ids(9, 3), ids(5, 4), (), 0.0, False)]
        with Largest() as largest:
            chosen, _ = made.score(rows)
            chosen.sum().backward()
        found[tokens] = largest.numbers
    assert found[1024] <= 4.1 * found[256]


def test_sixteen_thousand_tokens_have_the_log_probabilities_of_the_plain_pass() -> None:
    prompt, completion = ids(40, 5), ids(16384, 6)
    made = scorer(model(17000), temperature=1.0)
    with torch.no_grad():
        found, _ = made.score([Row(prompt, completion, (), 0.0, False)])
        logits = made._policy.model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        expected = logits.double().log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).squeeze(1)
    assert float((found[0] - expected).abs().max()) < 1e-4
