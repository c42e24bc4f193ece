"""Behaviour log-probabilities by the trainer's own model, for a server that gives none (or not those drawn from)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from grpo_mlflow.generation.base import Sampling
from grpo_mlflow.generation.sampling import processed_logprobs
from grpo_mlflow.model.policy import Policy

FLOOR = -50.0  # a token that rounding put outside top-k or top-p here, but not on the server


@torch.no_grad()
def behaviour_logprobs(
    policy: Policy, prompt: Sequence[int], completions: Sequence[Sequence[int]], sampling: Sampling
) -> list[tuple[float, ...]]:
    """Return the log-probability of every sampled token under the distribution that `sampling` draws from."""
    width = max(map(len, completions))
    rows = [[*prompt, *completion, *[policy.pad_id] * (width - len(completion))] for completion in completions]
    ids = torch.tensor(rows, device=policy.device)
    with policy.weights(), policy.autocast():
        logits = policy.model(input_ids=ids, use_cache=False).logits
    seen = torch.zeros(len(rows), logits.shape[-1], dtype=torch.bool, device=policy.device)
    seen[:, list(prompt)] = True
    found = []
    for place in range(len(prompt), len(prompt) + width):
        chosen = ids[:, place : place + 1]
        found.append(processed_logprobs(logits[:, place - 1], sampling, seen).gather(1, chosen))
        seen.scatter_(1, chosen, True)
    values = torch.cat(found, dim=1).clamp(min=FLOOR).tolist()
    return [tuple(row[: len(completion)]) for row, completion in zip(values, completions, strict=True)]
