"""The method of policy optimisation and its optimizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue

from grpo_mlflow.algorithm import names
from grpo_mlflow.config.fields import NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section, one_of, setting
from grpo_mlflow.config.methods import Method
from grpo_mlflow.config.optimizers import OPTIMIZERS


class TrainConfig(Section, resume=False, compared=True, varies=True, secret=False, evaluation=False):
    iterations: Positive = setting(10, "generate, update, evaluate: how many times", resume=True)
    batch_size: Positive = setting(8, "rollouts per forward and backward pass (micro-batch)")
    grad_accum_steps: Positive | Literal["auto"] = setting(
        1, "micro-batches per optimizer step; auto: one optimizer step per epoch"
    )
    epochs: Positive = setting(1, "passes over the rollouts of an iteration")
    optimizer: Annotated[str, one_of(OPTIMIZERS)] = setting("adamw", "adamw, or sgd with momentum")
    optimizer_options: dict[str, JsonValue] = setting({}, "its options: betas and eps of adamw, momentum of sgd")
    lr: PositiveFloat = setting(1e-5, "peak learning rate")
    lr_schedule: names.Schedule = setting("constant", "shape after the warm-up")
    lr_warmup_steps: NonNegative = setting(0, "optimizer steps of linear warm-up")
    weight_decay: NonNegativeFloat = setting(0.0, "weight decay: decoupled in adamw, added to the gradient in sgd")
    grad_clip: PositiveFloat | None = setting(1.0, "largest gradient norm; null is off")
    method: Method = setting(
        "grpo", "a method by its name: what it sets, keys given beside it change (docs/methods.md)"
    )
    loss: Annotated[str, one_of(names.LOSSES, "python:MODULE:FUNCTION")] = setting(
        "grpo", "the loss: grpo, which the keys below describe, or a function (docs/methods.md)"
    )
    loss_options: dict[str, JsonValue] = setting({}, "options of the loss's own, as a mapping")
    scale_rewards: names.Scale = setting("group", "what divides r - mean(group); leave_one_out: r - mean of the others")
    reward_weights: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = setting(
        {}, "weights of data.rewards in training, where they differ: evaluations keep those that are there"
    )
    multi_objective_aggregation: names.MultiObjective = setting(
        "sum_then_normalize",
        "several data.rewards: summed before they are normalised, or each normalised within its group first (GDPO)",
    )
    surrogate: names.Surrogate = setting("clip", "how the ratio is bounded")
    ratio_level: names.RatioLevel = setting("token", "ratio per token, or per rollout (GSPO)")
    clip_low: Annotated[float, Field(ge=0, le=1)] = setting(0.2, "lower bound of the ratio is 1 - clip_low")
    clip_high: NonNegativeFloat = setting(0.2, "upper bound of the ratio is 1 + clip_high")
    aggregation: names.Aggregation = setting("grpo", "how tokens are averaged")
    kl_coef: NonNegativeFloat = setting(0.05, "weight of KL(policy, reference); 0 loads no reference")
    kl_estimator: names.KLEstimator = setting("k3", "KL estimate per token")
    kl_target: PositiveFloat | None = setting(None, "adapt kl_coef towards this KL; null keeps it fixed")
    kl_horizon: Annotated[float, Field(ge=1, allow_inf_nan=False)] = setting(
        10.0, "iterations over which kl_coef adapts"
    )
    entropy_coef: NonNegativeFloat = setting(0.0, "weight of the entropy bonus")
    sampler_correction_cap: PositiveFloat | None = setting(
        2.0, "cap of the importance weight trainer / sampler; null is off"
    )
