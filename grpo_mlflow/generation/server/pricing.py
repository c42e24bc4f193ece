"""Whether a server prices what it draws: a few tokens, drawn as a run draws them, priced by the trainer again.

At temperature 1 without penalties, log-probabilities before and after processing are equal, so only the run's own
sampling shows which ones a server gives. Trained on, the wrong ones are another policy's, and no number would say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from grpo_mlflow.errors import ServerUnfit
from grpo_mlflow.generation.base import Sampling
from grpo_mlflow.generation.server import canary
from grpo_mlflow.generation.server.engine import Ask, Draw
from grpo_mlflow.generation.server.recompute import FLOOR, behaviour_logprobs
from grpo_mlflow.model.policy import Policy

_PROMPT, _COUNT, _LENGTH = 16, 8, 8  # tokens, completions, tokens of each
_SURE, _ROUNDING = 4.0, 1e-4  # standard errors; log-probabilities
_ENOUGH = 14  # tokens: fewer may all be closer to the wrong ones by chance


class WrongLogprobs(ServerUnfit):
    """A server's log-probabilities are not those of the distribution that it draws from."""


def question(policy: Policy, sampling: Sampling) -> Ask:
    """Return what a server is asked for; the context ends in the middle of a text, where much may follow."""
    few = replace(sampling, max_new_tokens=min(_LENGTH, sampling.max_new_tokens))
    return Ask(canary.tokens(policy)[:_PROMPT], _COUNT, few, 1, policy.eos_ids)


def check(policy: Policy, ask: Ask, draws: Sequence[Draw]) -> float:
    """Return the mean absolute difference of a server's prices from those of `policy`, whose weights it has.

    Raises:
        WrongLogprobs: they are not those of the distribution drawn from.
    """
    ids = [draw.token_ids for draw in draws]
    plain = replace(ask.sampling, temperature=1.0, top_p=1.0, top_k=-1, repetition_penalty=1.0)
    given = _flat([draw.logprobs or () for draw in draws])
    processed, raw = (_flat(behaviour_logprobs(policy, ask.token_ids, ids, how)) for how in (ask.sampling, plain))
    # Rounding puts a token on the edge of top-k or top-p outside on one side.
    inside = (processed > FLOOR) & first_of_each(ids)
    found = trouble(given[inside], processed[inside], raw[inside], canary.TOLERANCE[policy.dtype])
    if found:
        raise WrongLogprobs(f"its log-probabilities of the tokens that it draws {found}")
    return float((given - processed)[inside].abs().mean()) if inside.any() else 0.0


def trouble(given: Tensor, processed: Tensor, raw: Tensor, allowed: float) -> str | None:
    """Return what is wrong with log-probabilities (N,) that may be `processed` or `raw`, or None."""
    if not len(given):
        return None
    gap = float((given - processed).abs().mean())
    found = f"differ from the trainer's by {gap:.2g} on average (allowed: {allowed:g})"
    told = len(given) >= _ENOUGH and float((processed - raw).abs().mean()) > _ROUNDING
    if told and canary.preference(given, raw, processed) > _SURE:
        return f"{found}: they leave out temperature, top-k, top-p and penalties"
    return None if gap <= allowed else found


def first_of_each(completions: Sequence[Sequence[int]]) -> Tensor:
    """Return which tokens (N,) of all completions are the first after what precedes them, and so news.

    A peaked model draws the same beginnings over and over. Their rounding is the same, so it is no evidence twice.
    """
    seen: set[tuple[int, ...]] = set()
    found = []
    for tokens in completions:
        for end in range(1, len(tokens) + 1):
            found.append((beginning := tuple(tokens[:end])) not in seen)
            seen.add(beginning)
    return torch.tensor(found, dtype=torch.bool)


def _flat(rows: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor([value for row in rows for value in row], dtype=torch.float64)
