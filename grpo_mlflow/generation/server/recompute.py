"""Behaviour log-probabilities by the trainer's own model, for a server that gives none (or not those drawn from)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from grpo_mlflow.forward import ways
from grpo_mlflow.forward.padded import keeps_logits
from grpo_mlflow.generation.base import Sampling
from grpo_mlflow.generation.sampling import processed_logprobs
from grpo_mlflow.model import sharding
from grpo_mlflow.model.policy import Policy

FLOOR = -50.0  # a token that rounding put outside top-k or top-p here, but not on the server


Rows = list[tuple[float, ...]]


def behaviour_logprobs(
    policy: Policy, prompt: Sequence[int], completions: Sequence[Sequence[int]], sampling: Sampling
) -> Rows:
    """Return the log-probability of every sampled token under the distribution that `sampling` draws from."""
    with sharding.whole(policy.model):
        return _priced(policy, [(prompt, completions)], sampling, 0)[0]


def behaviour_logprobs_together(
    policy: Policy, asked: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]], sampling: Sampling
) -> list[Rows]:
    """As `behaviour_logprobs`, of several prompts and their completions, by all processes of a model in shards.

    Each gives its own prompts. None ever holds more than its shards and a layer.
    """
    own = sum(len(_widths(policy, completions)) for _, completions in asked)
    found = _priced(policy, asked, sampling, sharding.most(policy.model, own) - own)
    sharding.rest(policy.model)
    return found


@torch.no_grad()
def _priced(
    policy: Policy,
    asked: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]],
    sampling: Sampling,
    spare: int,
) -> list[Rows]:
    """Price completions, and make so many passes more."""
    found = []
    for prompt, completions in asked:
        of_prompt: dict[int, list[float]] = {}
        for width, index in _widths(policy, completions).items():
            values = _of_width(policy, prompt, [completions[row] for row in index], width, sampling)
            of_prompt |= dict(zip(index, values, strict=True))
        found.append([tuple(of_prompt[row][: len(each)]) for row, each in enumerate(completions)])
    for _ in range(spare):
        _of_width(policy, [policy.pad_id], [[policy.pad_id]], 1, sampling)
    return found


def _widths(policy: Policy, completions: Sequence[Sequence[int]]) -> dict[int, list[int]]:
    """Return which completions are computed in one pass, by the width of its rows."""
    lengths = [len(completion) for completion in completions]
    alike = ways.scoring(policy.model).way == "alike"  # padding would change what such a model computes
    if not alike:
        return {max(lengths): list(range(len(lengths)))}
    return {width: [row for row, length in enumerate(lengths) if length == width] for width in sorted({*lengths})}


def _of_width(
    policy: Policy, prompt: Sequence[int], completions: Sequence[Sequence[int]], width: int, sampling: Sampling
) -> list[list[float]]:
    """Return log-probabilities of completions padded to a width."""
    rows = [[*prompt, *completion, *[policy.pad_id] * (width - len(completion))] for completion in completions]
    ids = torch.tensor(rows, device=policy.device)
    kept = {"logits_to_keep": width + 1} if keeps_logits(policy.model) else {}  # those of the prompt may be many
    with policy.weights(), policy.autocast():
        logits = policy.model(input_ids=ids, use_cache=False, **kept).logits[:, -width - 1 : -1]
    seen = torch.zeros(len(rows), logits.shape[-1], dtype=torch.bool, device=policy.device)
    seen[:, list(prompt)] = True
    found = []
    for place in range(width):
        chosen = ids[:, len(prompt) + place, None]
        found.append(processed_logprobs(logits[:, place], sampling, seen).gather(1, chosen))
        seen.scatter_(1, chosen, True)
    values: list[list[float]] = torch.cat(found, dim=1).clamp(min=FLOOR).tolist()
    return values
