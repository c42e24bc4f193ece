"""The proof that a server samples from the weights it should: fixed tokens, scored on both sides.

An answer of 200 to a reload says nothing: servers have kept old weights, packed copies of them, or cached prefixes.
Scores are compared with the trainer's, within what the number format explains; and since a small step moves them less
than that, a server that repeats its former scores to the last bit while the trainer's have moved is caught, too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from grpo_mlflow.policy import Policy, completion_logprobs

_TEXT = (
    "Question: what is 12 + 34? Answer: 46. Question: what is 70 - 25? Answer: 45. "
    "Is (x1 OR NOT x2) true for 01? No, because neither holds."
)
_MOST = 64
# Measured on vLLM: fp32 agrees with transformers to 1.4e-5; bf16 is .022 apart on average and .19 at most.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def tokens(policy: Policy) -> tuple[int, ...]:
    """Return the fixed tokens of a policy's own vocabulary."""
    ids: list[int] = policy.tokenizer(_TEXT, add_special_tokens=False).input_ids
    return tuple(ids[:_MOST])


@torch.no_grad()
def expected(policy: Policy, ids: Sequence[int]) -> list[float]:
    """Return the trainer's log-probability of each token but the first, at temperature 1."""
    rows, start = torch.tensor([list(ids)], device=policy.device), torch.tensor([1], device=policy.device)
    with policy.autocast():
        logprobs, _ = completion_logprobs(policy.model, rows, start, len(ids) - 1, 1.0)
    values: list[float] = logprobs[0].float().tolist()
    return values


def error(scores: Sequence[float], wanted: Sequence[float]) -> float:
    """Return the mean absolute difference; infinity where the numbers of scores differ or one is not finite."""
    if len(scores) != len(wanted):
        return float("inf")
    mean = sum(abs(a - b) for a, b in zip(scores, wanted, strict=True)) / len(wanted)
    return mean if mean == mean else float("inf")
