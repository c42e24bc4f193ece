"""The method of policy optimisation and its optimizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from grpo_mlflow.config.fields import NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section
from grpo_mlflow.config.methods import Method


class TrainConfig(Section):
    iterations: Positive = Field(10, description="generate, update, evaluate: how many times")
    batch_size: Positive = Field(8, description="rollouts per forward and backward pass (micro-batch)")
    grad_accum_steps: Positive | Literal["auto"] = Field(
        1, description="micro-batches per optimizer step; auto: one optimizer step per epoch"
    )
    epochs: Positive = Field(1, description="passes over the rollouts of an iteration")
    lr: PositiveFloat = Field(1e-5, description="peak learning rate (AdamW)")
    lr_schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="shape after the warm-up")
    lr_warmup_steps: NonNegative = Field(0, description="optimizer steps of linear warm-up")
    weight_decay: NonNegativeFloat = Field(0.0, description="decoupled weight decay")
    grad_clip: PositiveFloat | None = Field(1.0, description="largest gradient norm; null is off")
    method: Method = Field(
        "grpo", description="a method by its name: what it sets, keys given beside it change (docs/methods.md)"
    )
    scale_rewards: Literal["group", "batch", "none", "leave_one_out"] = Field(
        "group", description="what divides r - mean(group); leave_one_out: r - mean of the others"
    )
    surrogate: Literal["clip", "cispo"] = Field("clip", description="how the ratio is bounded")
    ratio_level: Literal["token", "sequence"] = Field("token", description="ratio per token, or per rollout (GSPO)")
    clip_low: Annotated[float, Field(ge=0, le=1)] = Field(0.2, description="lower bound of the ratio is 1 - clip_low")
    clip_high: NonNegativeFloat = Field(0.2, description="upper bound of the ratio is 1 + clip_high")
    aggregation: Literal["grpo", "dapo", "dr_grpo", "bnpo"] = Field("grpo", description="how tokens are averaged")
    kl_coef: NonNegativeFloat = Field(0.05, description="weight of KL(policy, reference); 0 loads no reference")
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k3", description="KL estimate per token")
    kl_target: PositiveFloat | None = Field(None, description="adapt kl_coef towards this KL; null keeps it fixed")
    kl_horizon: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Field(
        10.0, description="iterations over which kl_coef adapts"
    )
    entropy_coef: NonNegativeFloat = Field(0.0, description="weight of the entropy bonus")
    sampler_correction_cap: PositiveFloat | None = Field(
        2.0, description="cap of the importance weight trainer / sampler; null is off"
    )
