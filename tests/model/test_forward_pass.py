"""`model.forward_pass`: whether passes of our own may stand in for transformers' modules."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from grpo_mlflow.config import resolve
from grpo_mlflow.generation import LocalGenerator, Sampling
from grpo_mlflow.model.policy import Policy, load_as
from grpo_mlflow.training.batching import Row
from grpo_mlflow.training.scoring import Scorer
from grpo_mlflow.types import Completion, Prompt


def sampled(policy: Policy) -> list[Completion]:
    prompts = [Prompt("a", (), (5, 9, 7)), Prompt("b", (), (6, 8))]
    return [one for group in LocalGenerator(policy, 2).generate(prompts, 3, Sampling(6), 0, ()) for one in group]


def scored(policy: Policy) -> torch.Tensor:
    return Scorer(policy, 1.0).score([Row((5, 9, 7), (4, 11, 8), (0.0,) * 3, 1.0, False)])[0].detach()


def test_with_transformers_alone_its_modules_compute_everything_and_the_numbers_stay(policy: Policy) -> None:
    plain_policy = replace(policy, written_out=False)
    sampled(policy), scored(policy), sampled(plain_policy)  # the trials of all ways call the modules
    calls: list[int] = []
    policy.model.model.norm.register_forward_hook(lambda *_: calls.append(1))
    fast = (sampled(policy), scored(policy))
    assert calls == []
    plain = sampled(plain_policy)
    assert len(calls) == max(len(one.token_ids) for one in plain)  # once for the prompts, then for each further token
    likelihood = scored(plain_policy)
    assert len(calls) == max(len(one.token_ids) for one in plain) + 1
    assert [one.token_ids for one in plain] == [one.token_ids for one in fast[0]]
    torch.testing.assert_close(likelihood, fast[1], atol=1e-5, rtol=1e-5)


def test_the_setting_reaches_the_policy(folder: Path) -> None:
    for value, expected in (("auto", True), ("transformers", False)):
        settings = resolve("tiny", [f"model.forward_pass={value}"]).config.model
        assert load_as(settings, folder, torch.device("cpu")).written_out is expected
