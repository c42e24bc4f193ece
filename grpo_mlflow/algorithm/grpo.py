"""The loss of GRPO and its relatives: surrogate times sampler correction, KL to the reference, entropy bonus."""

from __future__ import annotations

import torch

from grpo_mlflow.algorithm import losses
from grpo_mlflow.algorithm.losses import LossInputs, LossParts
from grpo_mlflow.algorithm.names import KLEstimator, RatioLevel, Surrogate


def grpo(
    inputs: LossInputs,
    *,
    ratio_level: RatioLevel,
    surrogate: Surrogate,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    kl_estimator: KLEstimator,
    entropy_coef: float,
) -> LossParts:
    """Return the loss of a micro-batch; docs/methods.md tells which settings make which published method."""
    policy, advantages = inputs.policy, inputs.advantages
    ratio = losses.log_ratio(policy, inputs.old, inputs.mask, ratio_level).exp()
    terms = losses.surrogate_terms(policy, ratio, advantages, clip_low, clip_high, surrogate)
    kl = torch.zeros_like(policy)
    if inputs.reference is not None:
        kl = losses.kl_terms(policy, inputs.reference, kl_estimator)
    low, high = losses.clipped_tokens(ratio, advantages, clip_low, clip_high)
    measured = {
        "ratio_shift": ratio.detach() - 1,
        "ratio_square": (ratio.detach() - 1).square(),
        "clip_low_frac": low,
        "clip_high_frac": high,
        "kl_divergence": kl,
        "entropy_mean": inputs.entropy,
    }
    return LossParts(
        terms={
            "loss_pg": inputs.weighted_sum(terms * inputs.correction),
            "loss_kl": kl_coef * inputs.weighted_sum(kl),
            "loss_entropy": -entropy_coef * inputs.weighted_sum(inputs.entropy),
        },
        sums={name: inputs.token_sum(values) for name, values in measured.items()},
        summary=_summary,
    )


def _summary(means: dict[str, float]) -> dict[str, float]:
    """Return the metrics from the means: the ratio's spread from its moments about 1, which keep their digits."""
    means = dict(means)
    shift, square = means.pop("ratio_shift"), means.pop("ratio_square")
    spread = {"ratio_mean": 1.0 + shift, "ratio_std": max(0.0, square - shift**2) ** 0.5}
    return {**means, **spread, "ratio_clip_frac": means["clip_low_frac"] + means["clip_high_frac"]}
