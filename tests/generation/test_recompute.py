"""Behaviour log-probabilities that the trainer computes for a server: they are those that the update starts from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_mlflow.forward import ways
from grpo_mlflow.generation.base import Sampling
from grpo_mlflow.generation.server.recompute import behaviour_logprobs
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.training.batching import Row
from grpo_mlflow.training.scoring import Scorer
from tests.support.small_models import SIZES

PROMPT = (5, 6, 7)
COMPLETIONS = [(8, 9, 10, 11), (12,), (13, 14)]


class Padded(LlamaForCausalLM):  # type: ignore[misc]
    """Feels padding at the end of its rows, as models do whose state runs over it."""

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        found = super().forward(input_ids, **kwargs)
        ends = (input_ids[:, -1] == 0)[:, None, None]
        found.logits = found.logits + ends * torch.linspace(0, 1, found.logits.shape[-1])
        return found


@pytest.mark.parametrize(
    ("kind", "attention", "way"), [(Padded, "eager", "alike"), (LlamaForCausalLM, "sdpa", "packed")]
)
def test_they_are_those_of_the_update(kind: Any, attention: str, way: str) -> None:
    torch.manual_seed(0)
    policy = Policy(
        kind(LlamaConfig(**SIZES, attn_implementation=attention)).eval(),
        None,
        torch.device("cpu"),
        torch.float32,
        (2,),
        0,
    )
    assert ways.scoring(policy.model).way == way
    rows = [Row(PROMPT, own, (0.0,) * len(own), 1.0, False) for own in COMPLETIONS]
    wanted, _ = Scorer(policy, 1.0).score(rows)
    found = behaviour_logprobs(policy, PROMPT, COMPLETIONS, Sampling(8))
    assert [len(each) for each in found] == [len(own) for own in COMPLETIONS]
    for each, row in zip(found, wanted, strict=True):
        torch.testing.assert_close(torch.tensor(each), row[: len(each)].detach(), atol=1e-5, rtol=0)
