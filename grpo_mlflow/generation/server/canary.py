"""The proof that a server samples from the weights it should: fixed tokens, priced on both sides.

An answer of 200 to a reload says nothing: servers have kept old weights, packed copies of them, or cached prefixes.
Three things have to hold. The server's log-probabilities of fixed tokens are the trainer's, within what the number
format explains. So is that of a token drawn after them, on the path that completions take: scoring a prompt does not
read the prefix cache, drawing does. And since one small step moves log-probabilities less than bfloat16's noise, the
server's must not be those that the trainer had before (`standing`): that is for servers that cannot be asked for sums
over their weights, which see more (`checksums`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from grpo_mlflow.model import sharding
from grpo_mlflow.model.policy import Policy

_TEXT = (
    "Question: what is 12 + 34? Answer: 46. Question: what is 70 - 25? Answer: 45. "
    "Is (x1 OR NOT x2) true for 01? No, because neither holds. "
)
_LENGTH = 160  # more than a block of a prefix cache, 128 tokens in vLLM on a CPU
# Measured on vLLM: fp32 agrees with transformers to 1.4e-5; bf16 is .022 apart on average and .19 at most.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
_ONE_TOKEN = 4.0  # a single log-probability may be this much further off than the mean of many
_OUTSTANDING, _PART = 4.0, 0.1
_MOVED = 1e-5  # less is float32's rounding
_SURE, _LIKELY = 6.0, 3.0  # standard errors: to stop a run, and to be content

Standing = Literal["new", "old", "unclear"]


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
    with sharding.whole(policy.model), policy.weights(), policy.autocast():
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


def standing(was: Expected, now: Expected, before: Reading, after: Reading) -> Standing:
    """Return whose scores the server's are: of the weights before or now, by what the trainer says of both.

    A server that keeps its weights scores identically: if the trainer's scores moved, that settles it. Otherwise each
    token is asked which of the trainer's scores it is closer to. In bfloat16 a step of any size brings new rounding on
    both sides, so a server with the new weights may be closer to either, equally often; it is called "old" only if
    that is beyond doubt.
    """
    old, new, found = (torch.tensor(each.scores, dtype=torch.float64) for each in (was, now, after))
    if float((new - old).abs().max()) < _MOVED:
        return "new"
    if after.scores == before.scores:
        return "old"
    found_new = preference(found, new, old)
    return "new" if found_new > _LIKELY else "old" if found_new < -_SURE else "unclear"


def partly_old(was: Expected, now: Expected, after: Reading, noise: float) -> bool:
    """Return whether a part of the trainer's change did not arrive, an output layer that kept its weights, say.

    `noise` is the largest `error` so far. What remains must stand out of it, and be a good part of the change.
    """
    change = sum(abs(a - b) for a, b in zip(was.scores, now.scores, strict=True)) / len(now.scores)
    return error(after, now) > max(_OUTSTANDING * noise, _PART * change, _MOVED)


def preference(found: Tensor, one: Tensor, other: Tensor) -> float:
    """Return by how many standard errors values (N,) are closer to `one` than to `other`, token by token; 0: neither.

    Where `one` and `other` differ from what is right by noise of the same size, either sign is as likely.
    """
    closer = (found - other).abs() - (found - one).abs()
    mean, spread = float(closer.mean()), float(closer.std()) / len(closer) ** 0.5
    return mean / spread if spread else math.copysign(math.inf, mean) if mean else 0.0
