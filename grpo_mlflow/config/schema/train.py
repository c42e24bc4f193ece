"""The method of policy optimisation and its optimizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue

from grpo_mlflow.algorithm import names
from grpo_mlflow.config.fields import NonNegative, NonNegativeFloat, OneOf, Positive, PositiveFloat, Section, setting
from grpo_mlflow.config.methods import Method
from grpo_mlflow.config.optimizers import OPTIMIZERS


class TrainConfig(Section, resume=False, compared=True, varies=True, secret=False, evaluation=False):
    """How long a run trains, its optimizer, and its loss."""

    iterations: Positive = setting(
        10, "number of iterations; each samples, trains on the samples and, at its interval, evaluates", resume=True
    )
    batch_size: Positive = setting(
        8, "rollouts per forward and backward pass (micro-batch); a smaller one needs less memory"
    )
    max_tokens_per_batch: Positive | None = setting(
        None,
        "tokens per forward and backward pass, beside batch_size: a micro-batch ends where the next rollout would "
        "exceed it, and a longer rollout is one alone; null: no limit",
        resume=True,
        compared=False,
    )
    grad_accum_steps: Positive | Literal["auto"] = setting(
        1, "micro-batches per optimizer step; auto: one optimizer step per epoch"
    )
    epochs: Positive = setting(1, "passes over the rollouts of an iteration")
    optimizer: Annotated[str, OneOf(OPTIMIZERS)] = setting(
        "adamw",
        "optimizer; adamw, adamw8bit (its state takes a quarter of the memory; needs bitsandbytes), or sgd with "
        "momentum, which needs half the memory and a learning rate of its own",
    )
    optimizer_options: dict[str, JsonValue] = setting(
        {}, "options of the optimizer: betas and eps of adamw and adamw8bit, momentum of sgd"
    )
    optimizer_offload: Literal["none", "cpu"] = setting(
        "none",
        "cpu: the optimizer's state and a copy of the trained weights live in host memory, and its step runs there",
        resume=True,
        compared=False,
    )
    sharding: Literal["none", "full"] = setting(
        "none",
        "with several processes: each holds all weights (none), or 1/N of weights, gradients and optimizer state "
        "(full, FSDP)",
        resume=True,
        compared=False,
        varies=False,
    )
    lr: PositiveFloat = setting(
        1e-5,
        "peak learning rate; usual: 1e-6 to 1e-5 for hub models, ten times that for adapters, 1e-4 to "
        "1e-3 for the embedded model",
    )
    lr_schedule: names.Schedule = setting(
        "constant", "course of the learning rate after the warm-up: constant, or falling to 0 at the last step"
    )
    lr_warmup_steps: NonNegative = setting(0, "optimizer steps over which the learning rate rises linearly to train.lr")
    weight_decay: NonNegativeFloat = setting(
        0.0, "weight decay: decoupled in adamw, added to the gradient in sgd; 0: off"
    )
    grad_clip: PositiveFloat | None = setting(
        1.0, "largest norm of the gradient; a larger one is scaled down to it; null: off"
    )
    method: Method = setting(
        "grpo",
        "a published method by name; it sets the keys that define it, and keys given along with it win "
        "(docs/methods.md)",
    )
    loss: Annotated[str, OneOf(names.LOSSES, "python:MODULE:FUNCTION")] = setting(
        "grpo",
        "loss function: grpo, which the keys of this section describe, or a function of your own (docs/methods.md)",
    )
    loss_options: dict[str, JsonValue] = setting({}, "options of a loss of your own, as a mapping")
    scale_rewards: names.Scale = setting(
        "group",
        "advantage of a rollout: reward minus the mean of its group, divided by the standard deviation of "
        "the group, of the batch, by nothing (none), or by that mean (mean: MaxRL, for rewards of 0 or more); "
        "leave_one_out: reward minus the mean of the others of its group",
    )
    reward_weights: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = setting(
        {},
        "weights of data.rewards in training, by name, where they differ from those there; evaluations "
        "keep those there",
    )
    multi_objective_aggregation: names.MultiObjective = setting(
        "sum_then_normalize",
        "with several data.rewards: add them up, then normalise the sum; or normalise each within its "
        "group first, then add (GDPO)",
    )
    surrogate: names.Surrogate = setting(
        "clip",
        "how the ratio of new to old policy is bounded: clip as in PPO, or cispo, which bounds the weight "
        "of the gradient",
    )
    ratio_level: names.RatioLevel = setting(
        "token", "ratio of new to old policy per token, or per rollout (sequence: GSPO)"
    )
    clip_low: Annotated[float, Field(ge=0, le=1)] = setting(0.2, "the ratio is bounded below by 1 - clip_low")
    clip_high: NonNegativeFloat = setting(0.2, "the ratio is bounded above by 1 + clip_high")
    aggregation: names.Aggregation = setting(
        "grpo",
        "weight of a token in the loss. grpo: mean per rollout, then over rollouts; dapo: mean over all "
        "tokens; dr_grpo: sum divided by max_new_tokens; bnpo: mean over the tokens of a micro-batch",
    )
    mask_truncated_completions: bool = setting(
        False,
        "completions that reached max_new_tokens without an end are not trained on; their rewards count in their group",
    )
    kl_coef: NonNegativeFloat = setting(
        0.05, "weight of the KL divergence from the reference model in the loss; 0: off, and no reference is loaded"
    )
    kl_estimator: names.KLEstimator = setting("k3", "estimator of the KL divergence per token, as named by Schulman")
    kl_target: PositiveFloat | None = setting(
        None, "KL divergence per token that kl_coef adapts to; null: kl_coef stays fixed"
    )
    kl_horizon: Annotated[float, Field(ge=1, allow_inf_nan=False)] = setting(
        10.0, "number of iterations over which kl_coef adapts to kl_target"
    )
    entropy_coef: NonNegativeFloat = setting(0.0, "weight of the entropy bonus in the loss; 0: off")
    importance_sampling_mode: names.ImportanceSampling = setting(
        "token_truncate",
        "weight of a token where the sampler's probabilities are not the trainer's: the trainer's over the sampler's, "
        "of the token or of its whole rollout (sequence), truncated at the cap and the floor or masked beyond them; "
        "none: no correction",
    )
    importance_sampling_cap: PositiveFloat | None = setting(
        2.0, "largest weight of importance_sampling_mode; null: no such bound"
    )
    importance_sampling_floor: PositiveFloat | None = setting(
        None, "smallest weight of importance_sampling_mode; null: no such bound"
    )
    ipo_eps: Annotated[float, Field(gt=0, lt=1)] | None = setting(
        None,
        "a token is masked where its probabilities in trainer and sampler differ by more than this (IPO of prime-rl, "
        "which takes 0.3); null: off",
    )

    @property
    def divides_by_mean(self) -> bool:
        """Whether advantages are divided by a mean of rewards, which are then 0 or more."""
        return self.scale_rewards == "mean" and self.multi_objective_aggregation == "sum_then_normalize"
