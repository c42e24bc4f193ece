"""From logits to the distribution that is sampled, and from that to tokens.

The order is that of transformers and vLLM: repetition penalty, temperature, top-k, top-p.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from grpo_mlflow.generation.base import Sampling

_BLOCK = 256  # tokens per block of the cumulative distribution


def processed_logprobs(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """Return the log-probabilities (R, V) of the distribution to draw from, -inf where a token is excluded.

    `seen` (R, V) is True on tokens of the prompt or the completion so far; needed for a repetition penalty
    (Keskar et al. 2019, section 4.1). At temperature 0 the result is that of temperature 1: greedy picks its maximum.
    """
    logits = logits.float()
    if seen is not None and sampling.repetition_penalty != 1.0:
        penalised = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if sampling.temperature not in (0, 1):
        logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        threshold = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if sampling.top_p < 1.0:
        ordered, index = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        above = probabilities.cumsum(dim=-1) - probabilities  # the mass of strictly likelier tokens
        excluded = torch.zeros_like(logits, dtype=torch.bool).scatter(1, index, above >= sampling.top_p)
        logits = logits.masked_fill(excluded, -torch.inf)
    return logits.log_softmax(dim=-1)


def draw(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """Return one token per row (R,) by inverting the cumulative distribution at `uniforms` (R,) in [0, 1).

    Probabilities are summed in float64, so that a large vocabulary does not shift the boundaries; of a large one over
    blocks of tokens first, then within the block that holds the target. A token of probability 0 is never drawn.
    """
    probabilities = logprobs.exp()
    if probabilities.shape[1] <= _BLOCK:
        cumulative = probabilities.cumsum(dim=1, dtype=torch.float64)
        return _first_above(cumulative, uniforms.double()[:, None] * cumulative[:, -1:]).squeeze(1)
    short = -probabilities.shape[1] % _BLOCK
    blocks = functional.pad(probabilities, (0, short)).view(len(probabilities), -1, _BLOCK)
    totals = blocks.sum(dim=2, dtype=torch.float64).cumsum(dim=1)
    targets = uniforms.double()[:, None] * totals[:, -1:]
    block = _first_above(totals, targets)
    before = totals.gather(1, (block - 1).clamp(min=0)).masked_fill(block == 0, 0.0)
    rows = torch.arange(len(blocks), device=blocks.device)
    within = blocks[rows, block.squeeze(1)].double().cumsum(dim=1)
    found = block * _BLOCK + _first_above(within, targets - before)
    return found.squeeze(1).clamp(max=logprobs.shape[1] - 1)


def _first_above(cumulative: Tensor, targets: Tensor) -> Tensor:
    """Return the first place (R, 1) where `cumulative` (R, n) exceeds `targets` (R, 1); rounding may reach the end.

    Of what is not finite it is some place: its log-probability tells.
    """
    most = cumulative[:, -1:]
    lowered = torch.minimum(targets, torch.nextafter(most, torch.zeros_like(most)))
    return torch.searchsorted(cumulative, lowered, right=True).clamp(max=cumulative.shape[1] - 1)


def choose(logits: Tensor, sampling: Sampling, uniforms: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return one token per row and its log-probability, both (R,), from `logits` (R, V) and `uniforms` (R,)."""
    logprobs = processed_logprobs(logits, sampling, seen)
    chosen = logprobs.argmax(dim=-1) if sampling.temperature == 0 else draw(logprobs, uniforms)
    return chosen, logprobs.gather(1, chosen[:, None]).squeeze(1)
