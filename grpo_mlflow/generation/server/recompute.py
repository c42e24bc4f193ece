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


@torch.no_grad()
def behaviour_logprobs(
    policy: Policy, prompt: Sequence[int], completions: Sequence[Sequence[int]], sampling: Sampling
) -> list[tuple[float, ...]]:
    """Return the log-probability of every sampled token under the distribution that `sampling` draws from."""
    lengths = [len(completion) for completion in completions]
    alike = ways.scoring(policy.model).way == "alike"  # padding would change what such a model computes
    found: dict[int, list[float]] = {}
    for width in sorted({*lengths}) if alike else [max(lengths)]:
        index = [row for row, length in enumerate(lengths) if length == width or not alike]
        values = _of_width(policy, prompt, [completions[row] for row in index], width, sampling)
        found |= dict(zip(index, values, strict=True))
    return [tuple(found[row][:length]) for row, length in enumerate(lengths)]


def _of_width(
    policy: Policy, prompt: Sequence[int], completions: Sequence[Sequence[int]], width: int, sampling: Sampling
) -> list[list[float]]:
    """Return log-probabilities of completions padded to a width."""
    rows = [[*prompt, *completion, *[policy.pad_id] * (width - len(completion))] for completion in completions]
    ids = torch.tensor(rows, device=policy.device)
    kept = {"logits_to_keep": width + 1} if keeps_logits(policy.model) else {}  # those of the prompt may be many
    with sharding.whole(policy.model), policy.weights(), policy.autocast():
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
