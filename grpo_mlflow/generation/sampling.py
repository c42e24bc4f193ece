"""From logits to the distribution that is sampled, and from that to tokens.

The order is that of transformers and vLLM: repetition penalty, temperature, top-k, top-p.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_mlflow.generation.base import Sampling


def processed_logprobs(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """Return the log-probabilities (R, V) of the distribution to draw from, -inf where a token is excluded.

    `seen` (R, V) is True on tokens of the prompt or the completion so far; needed for a repetition penalty
    (Keskar et al. 2019, section 4.1). At temperature 0 the result is that of temperature 1: greedy picks its maximum.
    """
    logits = logits.float()
    if seen is not None and sampling.repetition_penalty != 1.0:
        penalised = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if sampling.temperature > 0:
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

    In float64, so that a large vocabulary does not shift the boundaries.
    """
    cumulative = logprobs.double().exp().cumsum(dim=-1)
    targets = uniforms.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True).squeeze(1).clamp(max=logprobs.shape[-1] - 1)
