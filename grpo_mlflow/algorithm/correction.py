"""Weights for tokens that the sampler drew with another probability than the trainer gives them.

The two differ by the numerics of engines, by top-p, top-k and penalties, and by weights of an older version. With
d_t = old_t - behaviour_t on trained tokens, where old is the trainer's log-probability before the first step of the
iteration and behaviour the sampler's, the weight of a token is r = exp(d_t), or r = exp(sum_t d_t) of its whole rollout
(`sequence`), bounded by `floor` and `cap`:

    token_truncate, sequence_truncate    min(max(r, floor), cap)    TIS, Yao et al. 2025, "Your efficient RL framework
                                                                    secretly brings you off-policy RL training"
    token_mask, sequence_mask            r, but 0 outside of them   MIS, Liu et al. 2025, "When speed kills stability";
                                                                    per token IcePop, Ling Team 2025, arXiv 2510.18855
    none                                 1

The names of the modes are TRL's. Beside a mode, `eps` masks tokens whose probabilities differ by more than that: IPO of
prime-rl, whatever the sign of the advantage (after DPPO, arXiv 2602.04879). Weights are constants: they have no
gradient. Left out: masks that depend on the advantage, and corrections of the KL term.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_mlflow.algorithm.names import ImportanceSampling

_MOST = 20.0
"""The largest logarithm of a weight: the sum over a long rollout may be more than exp can hold, and inf times an
advantage of 0 is no number."""


@dataclass(frozen=True, slots=True)
class Correction:
    """How the weights are bounded; see the module."""

    mode: ImportanceSampling
    cap: float | None
    floor: float | None
    eps: float | None

    def __call__(self, old: Tensor, behaviour: Tensor, mask: Tensor) -> Weights:
        """Return the weights of log-probabilities (B, T); `mask` (B, T) is 1 on trained tokens."""
        old = old.detach()
        level, _, kind = self.mode.partition("_")
        logs = (old - behaviour).masked_fill(mask == 0, 0.0)
        if level == "sequence":
            logs = logs.sum(dim=1, keepdim=True).expand_as(logs)
        values = torch.ones_like(logs) if self.mode == "none" else logs.clamp(max=_MOST).exp()
        outside = torch.zeros_like(values, dtype=torch.bool)
        for bound, beyond in ((self.cap, torch.gt), (self.floor, torch.lt)):
            if bound is not None and self.mode != "none":
                outside = outside | beyond(values, bound)
        masked = outside if kind == "mask" else torch.zeros_like(outside)
        if kind == "truncate":
            values = values.clamp(min=self.floor, max=self.cap)
        if self.eps is not None:
            masked = masked | ((old.exp() - behaviour.exp()).abs() > self.eps)
        return Weights(values.masked_fill(masked, 0.0), masked, outside & ~masked)


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights (B, T), and where they are 0 because of a mask, and where a bound stands for them (both boolean)."""

    values: Tensor
    masked: Tensor
    truncated: Tensor


@dataclass(frozen=True, slots=True)
class Measures:
    """A micro-batch's share of what is measured between sampler and trainer: `sums` add up, of `largest` the largest
    counts. Both hold scalars over trained tokens, whose order `SUMS` and `LARGEST` give."""

    sums: Tensor
    largest: Tensor


SUMS = ("ratio", "kl", "difference", "weight", "square", "masked", "truncated")
LARGEST = ("above", "below")


def measures(old: Tensor, behaviour: Tensor, mask: Tensor, weights: Weights) -> Measures:
    """Return what is measured of log-probabilities (B, T) and the weights made of them.

    The KL divergence KL(sampler || trainer) of a token is estimated by exp(d) - 1 - d (k3 of Schulman 2020), which is
    never negative; tokens are the sampler's, so the estimate is unbiased.
    """
    logs = (old.detach() - behaviour).masked_fill(mask == 0, 0.0).clamp(max=_MOST)  # a sampler may say -inf
    values = weights.values
    tokens = (logs.exp(), torch.expm1(logs) - logs, logs.abs(), values, values.square())
    sums = [each.masked_fill(mask == 0, 0.0).sum() for each in (*tokens, weights.masked, weights.truncated)]
    largest = [each.masked_fill(mask == 0, -math.inf).max() for each in (logs, -logs)]
    return Measures(torch.stack([each.to(mask.dtype) for each in sums]), torch.stack(largest))


def metrics(means: Mapping[str, float], largest: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics from means over trained tokens and from the largest values, named as in `SUMS` and `LARGEST`.

    The effective sample size is (sum w)^2 / (n sum w^2) of n tokens (Kish 1965): 1 where all weigh the same.
    """
    return {
        "sampler_ratio_mean": means["ratio"],
        "sampler_ratio_min": _exp(-largest["below"]),
        "sampler_ratio_max": _exp(largest["above"]),
        "sampler_logp_difference_mean": means["difference"],
        "sampler_logp_difference_max": max(largest["above"], largest["below"]),
        "sampler_kl": means["kl"],
        "sampler_correction_mean": means["weight"],
        "sampler_masked_frac": means["masked"],
        "sampler_truncated_frac": means["truncated"],
        "sampler_ess": means["weight"] ** 2 / means["square"] if means["square"] else 0.0,
    }


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
