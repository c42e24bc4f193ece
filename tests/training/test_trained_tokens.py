"""The mask of trained tokens: what it leaves out has no part in the gradient, and without it nothing changes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grpo_mlflow.forward.padded import completion_logprobs
from grpo_mlflow.training import rollout_files
from grpo_mlflow.types import Completion, Group, Rollout
from tests.support.groups import ALL_TERMS, K, fresh, make_groups
from tests.support.updates import gradient, learner, measured

MASKS = {"the first": lambda n: n > 0, "every other": lambda n: n % 2 == 1, "none but the first": lambda n: n == 0}


def masked(groups: list[Group], keep: str) -> list[Group]:
    """The groups with a mask on each completion; what is not trained has a behaviour log-prob that is no number."""

    def change(rollout: Rollout) -> Rollout:
        old = rollout.completion
        trained = tuple(MASKS[keep](place) for place in range(len(old.token_ids)))
        behaviour = tuple(
            value if counts else math.nan for value, counts in zip(old.behaviour_logprobs, trained, strict=True)
        )
        return replace(rollout, completion=replace(old, trained=trained, behaviour_logprobs=behaviour))

    return [replace(group, rollouts=tuple(change(rollout) for rollout in group.rollouts)) for group in groups]


def by_hand(groups: list[Group], aggregation: str) -> torch.Tensor:
    """The gradient of the mean of -A log pi over the trained tokens, row by row in plain forward passes."""
    policy = fresh()
    rollouts = [(r, a) for g in groups for r, a in zip(g.rollouts, g.advantages, strict=True)]
    tokens = sum(sum(r.completion.trained or ()) for r, _ in rollouts)
    loss = torch.zeros(())
    for rollout, advantage in rollouts:
        prompt, completion = rollout.prompt.token_ids, rollout.completion
        ids, start = torch.tensor([[*prompt, *completion.token_ids]]), torch.tensor([len(prompt)])
        chosen, _ = completion_logprobs(policy.model, ids, start, len(completion.token_ids), 0.8)
        own = torch.tensor(completion.trained)
        weight = 1 / (len(rollouts) * max(1, int(own.sum()))) if aggregation == "grpo" else 1 / tokens
        loss = loss - weight * advantage * chosen[0][own].sum()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("keep", MASKS)
@pytest.mark.parametrize("aggregation", ["grpo", "dapo"])
def test_only_trained_tokens_have_a_gradient(aggregation: str, keep: str) -> None:
    groups = masked(make_groups(3), keep)
    settings = {"aggregation": aggregation, "importance_sampling_mode": "none"}
    found = gradient(groups, **settings)
    expected = by_hand(groups, aggregation)
    assert expected.norm() > 0
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_what_is_not_trained_is_not_measured() -> None:
    groups = masked(make_groups(3), "every other")
    settings = {**ALL_TERMS, "ratio_level": "sequence"}
    made = learner(fresh(), 3 * K, fresh(seed=4), **settings)
    metrics = measured(made, groups)
    assert all(math.isfinite(value) for value in metrics.values()), metrics
    assert metrics["tokens_trained"] == sum(sum(r.completion.trained or ()) for g in groups for r in g.rollouts)
    assert torch.isfinite(gradient(groups, **settings)).all()


@pytest.mark.parametrize("aggregation", ["grpo", "dapo", "dr_grpo", "bnpo"])
def test_a_mask_of_all_tokens_is_no_mask(aggregation: str) -> None:
    groups = make_groups(3, flat=(1,))
    full = [
        replace(
            group,
            rollouts=tuple(
                replace(r, completion=replace(r.completion, trained=(True,) * len(r.completion.token_ids)))
                for r in group.rollouts
            ),
        )
        for group in groups
    ]
    settings = {**ALL_TERMS, "aggregation": aggregation}
    assert torch.equal(gradient(full, **settings), gradient(groups, **settings))


def test_a_rollout_without_trained_tokens_still_counts() -> None:
    groups = make_groups(2)
    none = [
        replace(r, completion=replace(r.completion, trained=(False,) * len(r.completion.token_ids)))
        for r in groups[1].rollouts
    ]
    found = gradient([groups[0], replace(groups[1], rollouts=tuple(none))])
    alone = gradient([groups[0]])
    assert (found - alone / 2).norm() < 1e-5 * alone.norm()  # one of 2 K rollouts where it was one of K
    assert len(none) == K


def untrained(rollout: Rollout) -> Rollout:
    none = (False,) * len(rollout.completion.token_ids)
    return replace(rollout, completion=replace(rollout.completion, trained=none))


def cut_off(groups: list[Group]) -> list[Rollout]:
    return [r for group in groups for r in group.rollouts if r.completion.finish_reason == "length"]


@pytest.mark.parametrize("aggregation", ["grpo", "dapo", "dr_grpo", "bnpo"])
def test_completions_that_were_cut_off_are_not_trained_on_if_the_config_says_so(aggregation: str) -> None:
    groups = make_groups(5, flat=(1,))
    assert 2 <= len(cut_off(groups)) <= 5
    none = [
        replace(group, rollouts=tuple(untrained(r) if r in cut_off([group]) else r for r in group.rollouts))
        for group in groups
    ]
    settings = {**ALL_TERMS, "aggregation": aggregation}
    expected, on = gradient(none, **settings), {**settings, "mask_truncated_completions": True}
    assert torch.equal(gradient(groups, **on), expected)
    assert (gradient(groups, **settings) - expected).norm() > 0.1 * expected.norm()
    if aggregation != "bnpo":  # which is defined by the split
        for size in (1, 3):
            torch.testing.assert_close(gradient(groups, batch_size=size, **on), expected, atol=1e-6, rtol=0)


def test_what_was_cut_off_counts_among_the_rollouts_and_not_among_the_tokens() -> None:
    """By hand: -A log pi over the tokens of the others, the advantages those of whole groups."""
    groups = make_groups(5)
    policy, loss = fresh(), {"grpo": torch.zeros(()), "dapo": torch.zeros(())}
    kept = [
        (r, a)
        for g in groups
        for r, a in zip(g.rollouts, g.advantages, strict=True)
        if r.completion.finish_reason == "stop"
    ]
    tokens = sum(len(r.completion.token_ids) for r, _ in kept)
    for rollout, advantage in kept:
        prompt, completion = rollout.prompt.token_ids, rollout.completion.token_ids
        ids, start = torch.tensor([[*prompt, *completion]]), torch.tensor([len(prompt)])
        chosen, _ = completion_logprobs(policy.model, ids, start, len(completion), 0.8)
        loss["grpo"] = loss["grpo"] - advantage * chosen[0].sum() / (5 * K * len(completion))
        loss["dapo"] = loss["dapo"] - advantage * chosen[0].sum() / tokens
    for aggregation, each in loss.items():
        slopes = torch.autograd.grad(each, list(policy.model.parameters()), retain_graph=True)
        expected = torch.cat([slope.flatten() for slope in slopes])
        settings = {"aggregation": aggregation, "importance_sampling_mode": "none", "mask_truncated_completions": True}
        assert (gradient(groups, **settings) - expected).norm() < 1e-5 * expected.norm()
    made = learner(fresh(), 5 * K, mask_truncated_completions=True)
    assert measured(made, groups)["tokens_trained"] == tokens


def test_a_step_without_trained_tokens_has_no_gradient() -> None:
    (group,) = make_groups(1)
    rollouts = tuple(
        replace(r, completion=replace(r.completion, trained=(False,) * len(r.completion.token_ids)))
        for r in group.rollouts
    )
    assert gradient([replace(group, rollouts=rollouts)]).abs().max() == 0


def test_files_keep_the_mask_and_those_without_one_train_on_all(tmp_path: Path) -> None:
    (group,) = make_groups(1)
    (other,) = masked([group], "every other")
    (other,) = [
        replace(
            other,
            rollouts=tuple(
                replace(r, completion=replace(r.completion, behaviour_logprobs=(0.0,) * len(r.completion.token_ids)))
                for r in other.rollouts
            ),
        )
    ]
    rollout_files.write(tmp_path / "x", [group, other])
    first, second = (tmp_path / "x").read_text().splitlines()
    assert "trained" not in first
    assert '"trained":[false' in second
    assert rollout_files.read(tmp_path / "x") == [group, other]


def test_a_mask_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2 marks of trained tokens for 3 tokens"):
        Completion((1, 2, 3), "", (0.0,) * 3, "stop", 0, trained=(True, False))
