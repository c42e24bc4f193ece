"""From hidden states to the log-probability and entropy of single tokens, without the whole logits at once.

A vocabulary of 150 thousand makes the logits of a micro-batch the largest tensor of the update, and log-softmax, its
gradient and the entropy would each be another of that size. Here the output layer, the softmax and their gradients run
over slices of tokens; a backward pass computes a slice's logits again instead of keeping them, unless all fit a small
budget. Nothing is approximated.

With z = logits / temperature, p = softmax(z), H = -sum p log p:  d log p_y / dz = onehot(y) - p  and
dH / dz = -p (log p + H). Some models (Gemma, Riviere et al. 2024, arXiv 2408.00118) cap logits x softly, to
c tanh(x / c), whose slope is 1 - tanh(x / c)^2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from grpo_mlflow.forward import tuning

IMPOSSIBLE = -1e30  # a logit without a probability, which minus infinity would make nan in the entropy


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    entropy_gradient: bool = False,
    sampled: int | None = None,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return log softmax((hidden @ weight.T + bias) / temperature) at the targets, and its entropy, both (N,) float32.

    `hidden` is (N, D), `weight` (V, D), `bias` (V,), `targets` (N,). Under autocast the output layer runs in its type.
    The entropy has a gradient only where asked for. Only the first `sampled` tokens are possible; None: all. `cap` is
    the c of logits that are capped softly; None: they are not.
    """
    apply: Any = _TokenLogprobs.apply
    chosen, entropy = apply(hidden, weight, bias, targets, temperature, entropy_gradient, sampled, cap)
    return chosen, entropy


def _slices(tokens: int, vocabulary: int) -> list[slice]:
    size = max(1, tuning.LOGITS_SLICE // vocabulary)
    return [slice(start, start + size) for start in range(0, tokens, size)]


def _logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, sampled: int | None, cap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Return log-probabilities (n, V) in float32, and the slope of capped logits, None where they are not."""
    logits, slope = functional.linear(hidden, weight, bias).float(), None
    if cap is not None:
        bent = (logits / cap).tanh_()
        logits, slope = bent * cap, 1 - bent.square_()
    if sampled is not None:
        logits[:, sampled:] = IMPOSSIBLE
    if temperature != 1.0:
        logits = logits / temperature
    return logits.log_softmax(dim=-1), slope


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        entropy_gradient: bool,
        sampled: int | None,
        cap: float | None,
    ) -> tuple[Tensor, Tensor]:
        kind = hidden.device.type
        used = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        ctx.inputs = hidden.dtype, weight.dtype
        hidden, weight = hidden.to(used), weight.to(used)
        bias = None if bias is None else bias.to(used)
        tokens, vocabulary = len(hidden), len(weight)
        chosen = hidden.new_empty(tokens, dtype=torch.float32)
        entropy = torch.empty_like(chosen)
        keeps = any(ctx.needs_input_grad) and cap is None and tokens * vocabulary <= tuning.KEPT_LOGPROBS
        kept: list[Tensor] = []
        with torch.autocast(kind, enabled=False):
            for part in _slices(tokens, vocabulary):
                logprobs, _ = _logprobs(hidden[part], weight, bias, temperature, sampled, cap)
                chosen[part] = logprobs.gather(1, targets[part, None]).squeeze(1)
                entropy[part] = _entropy(logprobs)
                if keeps:
                    kept.append(logprobs)
                del logprobs  # or it would stand beside those of the next slice
        ctx.save_for_backward(hidden, weight, bias, targets, entropy, *kept)
        ctx.temperature, ctx.sampled, ctx.cap = temperature, sampled, cap
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        ctx.entropy_gradient = entropy_gradient
        return chosen, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        on_chosen, on_entropy = grads
        hidden, weight, bias, targets, entropy, *kept = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        to_hidden = torch.empty_like(hidden) if needs_hidden else None
        to_weight: Tensor | None = None
        to_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        for number, part in enumerate(_slices(len(hidden), len(weight))):
            slope = None
            if kept:
                logprobs = kept[number]
            else:
                logprobs, slope = _logprobs(hidden[part], weight, bias, ctx.temperature, ctx.sampled, ctx.cap)
            gradient = logprobs.exp()
            if ctx.entropy_gradient:
                change = (logprobs + entropy[part, None]) * -on_entropy[part, None]
                gradient *= change.sub_(on_chosen[part, None])
            else:
                gradient *= -on_chosen[part, None]
            gradient.scatter_add_(1, targets[part, None], on_chosen[part, None])
            if ctx.temperature != 1.0:
                gradient /= ctx.temperature
            if slope is not None:
                gradient *= slope
            typed = gradient.to(weight.dtype)
            if to_hidden is not None:
                torch.mm(typed, weight, out=to_hidden[part])
            if needs_weight:
                if to_weight is None:  # the first slice needs no zeros to be added to
                    to_weight = (typed.T @ hidden[part]).float()
                elif to_weight.dtype == typed.dtype:
                    to_weight.addmm_(typed.T, hidden[part])
                else:
                    to_weight += typed.T @ hidden[part]
            if to_bias is not None:
                to_bias += gradient.sum(dim=0)
            del logprobs, slope, gradient, typed  # or they would stand beside those of the next slice
        if (
            needs_weight and to_weight is None
        ):  # no tokens: without a gradient the optimizer would pass this weight over
            to_weight = torch.zeros_like(weight)
        of_hidden, of_weight = ctx.inputs
        return (
            None if to_hidden is None else to_hidden.to(of_hidden),
            None if to_weight is None else to_weight.to(of_weight),
            None if to_bias is None else to_bias.to(of_weight),
            *[None] * 5,
        )


def _entropy(logprobs: Tensor) -> Tensor:
    """Return (n,) of log-probs (n, V), all finite."""
    return -logprobs.exp().mul_(logprobs).sum(dim=-1)
