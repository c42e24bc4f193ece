"""What every backend must do. Each test class that inherits from `Conformance` runs all of it over one backend."""

from __future__ import annotations

import pytest
import torch

from grpo_mlflow.forward.padded import completion_logprobs
from grpo_mlflow.generation import Generator, Sampling
from grpo_mlflow.generation.server.recompute import behaviour_logprobs
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.tasks import Arithmetic, Sat
from grpo_mlflow.types import Completion, Prompt


def prompts(policy: Policy) -> list[Prompt]:
    """Prompts of very different lengths."""
    return [
        policy.prompt(Arithmetic().problem("train", 1)),
        policy.prompt(Sat().problem("train", 2)),
        policy.prompt(Arithmetic(terms=4).problem("train", 3)),
    ]


def ids_of(groups: list[list[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[completion.token_ids for completion in group] for group in groups]


class Conformance:
    """Needs the fixtures `policy` and `generator`, the latter synced to version 0 of the former."""

    def test_completions_are_well_formed(self, policy: Policy, generator: Generator) -> None:
        groups = generator.generate(prompts(policy), 4, Sampling(12), 0, ("x",))
        assert [len(group) for group in groups] == [4, 4, 4]
        for completion in (c for group in groups for c in group):
            ended = completion.token_ids[-1] in policy.eos_ids
            assert completion.finish_reason == ("stop" if ended else "length")
            assert 0 < len(completion.token_ids) == len(completion.behaviour_logprobs) <= 12
            assert ended or len(completion.token_ids) == 12
            assert not set(completion.token_ids[:-1]) & set(policy.eos_ids)
            assert completion.policy_version == 0
            assert completion.text == policy.decode([completion.token_ids])[0]

    @pytest.mark.parametrize("temperature", [0.6, 1.0, 1.4])
    def test_behaviour_logprobs_are_the_trainers(
        self, policy: Policy, generator: Generator, temperature: float
    ) -> None:
        given, gaps = prompts(policy), []
        groups = generator.generate(given, 4, Sampling(12, temperature), 0, ("x",))
        for prompt, completions in zip(given, groups, strict=True):
            for completion in completions:
                ids = torch.tensor([[*prompt.token_ids, *completion.token_ids]])
                starts, width = torch.tensor([len(prompt.token_ids)]), len(completion.token_ids)
                logprobs, _ = completion_logprobs(policy.model, ids, starts, width, temperature)
                gaps.append((logprobs[0] - torch.tensor(completion.behaviour_logprobs)).abs().detach())
        assert torch.cat(gaps).mean() < 1e-4
        assert torch.cat(gaps).max() < 1e-3

    def test_draws_differ_within_a_group_and_repeat_with_the_seed(self, policy: Policy, generator: Generator) -> None:
        given, sampling = prompts(policy), Sampling(12, 1.2)
        first = ids_of(generator.generate(given, 8, sampling, 0, ("train", 1)))
        assert all(len(set(group)) >= 7 for group in first)
        assert ids_of(generator.generate(given, 8, sampling, 0, ("train", 1))) == first
        assert ids_of(generator.generate(given, 8, sampling, 0, ("train", 2))) != first
        assert ids_of(generator.generate(given, 8, sampling, 1, ("train", 1))) != first

    def test_draws_depend_on_the_problem_and_replicate_alone(self, policy: Policy, generator: Generator) -> None:
        given, sampling = prompts(policy), Sampling(10)
        together = ids_of(generator.generate(given, 4, sampling, 0, ("train", 1)))
        alone = [ids_of(generator.generate([prompt], 2, sampling, 0, ("train", 1)))[0] for prompt in given[::-1]]
        assert [group[:2] for group in together] == alone[::-1]

    def test_greedy_is_the_likeliest_token_each_time(self, policy: Policy, generator: Generator) -> None:
        given = prompts(policy)
        found = generator.generate(given, 1, Sampling(6, temperature=0.0), 0, ())
        for prompt, group in zip(given, found, strict=True):
            ids = list(prompt.token_ids)
            for _ in range(6):
                ids.append(int(policy.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] in policy.eos_ids:
                    break
            assert list(group[0].token_ids) == ids[len(prompt.token_ids) :]


class ShapedConformance(Conformance):
    """Further, for backends whose log-probabilities are those after top-k, top-p and penalties."""

    @pytest.mark.parametrize(
        "sampling",
        [Sampling(8, 0.7, 0.8), Sampling(8, 1.2, 1.0, 5), Sampling(8, 0.9, 0.9, 20, 1.3)],
        ids=["top_p", "top_k", "all"],
    )
    def test_logprobs_are_those_of_the_distribution_drawn_from(
        self, policy: Policy, generator: Generator, sampling: Sampling
    ) -> None:
        given = prompts(policy)
        for prompt, group in zip(given, generator.generate(given, 4, sampling, 0, ("y",)), strict=True):
            anew = behaviour_logprobs(policy, prompt.token_ids, [c.token_ids for c in group], sampling)
            for completion, values in zip(group, anew, strict=True):
                assert completion.behaviour_logprobs == pytest.approx(values, abs=1e-3)
