"""What a loss takes and returns, and the parts that losses are made of, as pure functions of tensors.

A loss is a weighted sum over completion tokens: `sum_i sum_t weight_i * term_it`. `term` is the loss's own; `weight`
comes from the aggregation, computed once over a whole optimizer step, so that splitting the step into micro-batches
cannot change the gradient.

Shapes: B rollouts, T completion tokens, padded on the right; `mask` (B, T) is 1 on real tokens.

Left out on purpose: percentile clipping of advantages and per-micro-batch denominators (other than `bnpo`, which is
defined by them), because both make the gradient depend on how the batch was split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_mlflow.algorithm.names import Aggregation, KLEstimator, RatioLevel, Surrogate


@dataclass(frozen=True, slots=True)
class LossInputs:
    """A micro-batch as a loss sees it. Only `policy` and `entropy` carry a gradient."""

    policy: Tensor
    """(B, T) log-probabilities under the model that is trained"""
    old: Tensor
    """(B, T) the same before the iteration's first optimizer step"""
    behaviour: Tensor
    """(B, T) those that the sampler reported"""
    correction: Tensor
    """(B, T) weight of each token by `train.importance_sampling_mode`, a constant (`correction.Correction`)"""
    reference: Tensor | None
    """(B, T) those of the reference model; None where `train.kl_coef` is 0"""
    entropy: Tensor
    """(B, T) entropy of the policy, in nats; its gradient is computed only where `train.entropy_coef` is above 0"""
    mask: Tensor
    """(B, T) 1 on tokens that are trained, 0 elsewhere"""
    advantages: Tensor
    """(B,)"""
    weights: Tensor
    """(B,) weight of each token of a rollout, by `train.aggregation`"""

    def weighted_sum(self, terms: Tensor) -> Tensor:
        """Return `weighted_sum` of terms (B, T) over this micro-batch."""
        return weighted_sum(terms, self.weights, self.mask)

    def token_sum(self, values: Tensor) -> Tensor:
        """Return the sum of values (B, T) over trained tokens, a scalar without gradient."""
        return values.detach().to(self.mask.dtype).masked_fill(self.mask == 0, 0.0).sum()


@dataclass(frozen=True, slots=True)
class LossParts:
    """A micro-batch's share of a loss and of its metrics; all tensors are scalars, and shares add up."""

    terms: Mapping[str, Tensor]
    """Weighted sums, named `loss_...`. Their total is what is minimised."""
    sums: Mapping[str, Tensor]
    """Sums over trained tokens, by metric: each is logged as its mean."""
    summary: Callable[[dict[str, float]], dict[str, float]] | None = None
    """Turns the means of `sums` into the metrics to log; None: they are logged as they are."""


def log_ratio(policy: Tensor, old: Tensor, mask: Tensor, level: RatioLevel) -> Tensor:
    """Return log rho (B, T).

    `token`: policy - old. `sequence`: its mean over the tokens of a rollout, repeated on each of them
    (GSPO, Zheng et al. 2025, eq. 7).
    """
    difference = (policy - old).masked_fill(mask == 0, 0.0)
    if level == "token":
        return difference
    mean = difference.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return mean * mask


def surrogate_terms(
    policy: Tensor, ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, kind: Surrogate
) -> Tensor:
    """Return the policy-gradient term of each token (B, T), to be minimised.

    `clip`: -min(rho A, clip(rho, 1 - low, 1 + high) A), Schulman et al. 2017 with the two bounds of DAPO (Yu et al.
    2025). `cispo`: -stop_gradient(clip(rho)) A log pi, MiniMax-M1 (2025), eq. 4: a clipped token keeps its gradient.
    `advantages` is (B,).
    """
    advantage = advantages[:, None]
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    if kind == "cispo":
        return -clipped.detach() * advantage * policy
    return -torch.minimum(ratio * advantage, clipped * advantage)


def clipped_tokens(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """Return two boolean (B, T): where the lower, and where the upper bound takes the gradient away under `clip`."""
    advantage = advantages[:, None]
    return (ratio < 1.0 - clip_low) & (advantage < 0), (ratio > 1.0 + clip_high) & (advantage > 0)


def kl_terms(policy: Tensor, reference: Tensor, estimator: KLEstimator) -> Tensor:
    """Return the KL(policy || reference) estimate of each token (B, T) (Schulman 2020, "Approximating KL").

    With d = policy - reference: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d.
    """
    difference = policy - reference
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    return torch.expm1(-difference) + difference


def aggregation_weights(
    lengths: Tensor, kind: Aggregation, *, rollouts: int, tokens: int, max_completion_length: int
) -> Tensor:
    """Return the weight (B,) of every token of each rollout.

    `lengths` (B,) and `tokens` count trained tokens. `rollouts` and `tokens` count the whole optimizer step over all
    processes, flat groups included. A rollout without trained tokens has none that its weight could act on.

        grpo     1 / (rollouts * length_i)                 mean over rollouts of the mean over tokens
        dapo     1 / tokens                                mean over all tokens (Yu et al. 2025)
        dr_grpo  1 / (rollouts * max_completion_length)    no length bias (Liu et al. 2025)
        bnpo     1 / tokens of the micro-batch: pass those as `tokens` and average over micro-batches
    """
    if kind == "grpo":
        return 1.0 / (rollouts * lengths.clamp(min=1))
    if kind == "dr_grpo":
        return torch.full_like(lengths, 1.0 / (rollouts * max_completion_length), dtype=torch.float32)
    return torch.full_like(lengths, 1.0 / max(1, tokens), dtype=torch.float32)


def weighted_sum(terms: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """Return sum_i weight_i sum_t mask_it term_it, a scalar. A masked term may hold anything, also inf."""
    return (terms.masked_fill(mask == 0, 0.0).sum(dim=1) * weights).sum()
