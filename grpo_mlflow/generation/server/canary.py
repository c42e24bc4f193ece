"""The proof that a server samples from the weights it should: fixed tokens, priced on both sides.

An answer of 200 to a reload says nothing: servers have kept old weights, packed copies of them, or cached prefixes.
Three things have to hold. The server's log-probabilities of fixed tokens are the trainer's, within what the number
format explains. So is that of a token drawn after them, on the path that completions take: scoring a prompt does not
read the prefix cache, drawing does. And since one small step moves log-probabilities less than bfloat16's noise, the
change since the last weights, regressed on the trainer's change, must not be beyond doubt closer to none than to all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_mlflow.model.policy import Policy

_TEXT = (
    "Question: what is 12 + 34? Answer: 46. Question: what is 70 - 25? Answer: 45. "
    "Is (x1 OR NOT x2) true for 01? No, because neither holds. "
)
_LENGTH = 160  # more than a block of a prefix cache, 128 tokens in vLLM on a CPU
# Measured on vLLM: fp32 agrees with transformers to 1.4e-5; bf16 is .022 apart on average and .19 at most.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
_ONE_TOKEN = 4.0  # a single log-probability may be this much further off than the mean of many
_SURE = 4.0  # standard errors


@dataclass(frozen=True, slots=True)
class Expected:
    """What the trainer says: `scores` of the fixed tokens but the first, `after` (V,) of any token that follows."""

    scores: tuple[float, ...]
    after: Tensor


@dataclass(frozen=True, slots=True)
class Reading:
    """What the server says; `logprob` is that of the token it drew, None where it gives none."""

    scores: tuple[float, ...]
    drawn: int
    logprob: float | None


def tokens(policy: Policy) -> tuple[int, ...]:
    """Return the fixed tokens, in a policy's own vocabulary."""
    ids: list[int] = policy.tokenizer(_TEXT, add_special_tokens=False).input_ids
    return tuple((ids * (_LENGTH // len(ids) + 1))[:_LENGTH])


@torch.no_grad()
def expected(policy: Policy, ids: Sequence[int]) -> Expected:
    """Return the trainer's log-probabilities, at temperature 1."""
    rows = torch.tensor([list(ids)], device=policy.device)
    with policy.autocast():
        logits = policy.model(input_ids=rows, use_cache=False).logits[0]
    logprobs = logits.float().log_softmax(-1)
    scores = logprobs[:-1].gather(1, rows[0, 1:, None]).squeeze(1)
    return Expected(tuple(scores.tolist()), logprobs[-1].cpu())


def error(reading: Reading, wanted: Expected) -> float:
    """Return the mean absolute difference of the scores; infinity where they cannot be compared."""
    if len(reading.scores) != len(wanted.scores):
        return math.inf
    mean = sum(abs(a - b) for a, b in zip(reading.scores, wanted.scores, strict=True)) / len(wanted.scores)
    return mean if math.isfinite(mean) else math.inf


def trouble(reading: Reading, wanted: Expected, dtype: torch.dtype) -> str | None:
    """Return what shows that a reading is not that of the wanted weights, or None."""
    allowed, found = TOLERANCE[dtype], error(reading, wanted)
    if not found <= allowed:
        return (
            f"its log-probabilities of fixed tokens differ from the trainer's by {found:.2g} on average (allowed: "
            f"{allowed:g})"
        )
    if reading.logprob is not None:
        gap = abs(reading.logprob - float(wanted.after[reading.drawn]))
        if not gap <= _ONE_TOKEN * allowed:
            return (
                f"it scores a prompt right, but the token that it draws after it is {gap:.2g} off (allowed: "
                f"{_ONE_TOKEN * allowed:g}): it reads cached prefixes of other weights"
            )
    return None


def stayed(was: Expected, now: Expected, before: Reading, after: Reading) -> bool:
    """Return whether the server's scores beyond doubt did not go along when the trainer's moved.

    With the trainer's changes x_i and the server's y_i, the slope b = <x, y> / <x, x> is 1 for a server that has the
    new weights and 0 for one that kept the old; its standard error comes from the residuals.
    """
    x = torch.tensor(now.scores, dtype=torch.float64) - torch.tensor(was.scores, dtype=torch.float64)
    y = torch.tensor(after.scores, dtype=torch.float64) - torch.tensor(before.scores, dtype=torch.float64)
    if float(x.abs().max()) < 1e-6:
        return False
    slope = float((x @ y) / (x @ x))
    spread = float((y - slope * x).square().sum() / (len(x) - 1) / (x @ x)) ** 0.5
    return bool(slope + _SURE * spread < 0.5)
