"""The model that is trained: where it comes from, its adapter, and the recipe of the embedded one."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, JsonValue

from grpo_mlflow.config.fields import (
    Device,
    Fraction,
    GivenDevice,
    NonNegative,
    Positive,
    PositiveFloat,
    Section,
    as_tuple,
    setting,
)


class TinyConfig(Section, resume=False, compared=True, varies=True, secret=False, evaluation=False):
    """The recipe of the embedded model; any change makes another model in the cache."""

    hidden_size: Positive = setting(128, "width of the transformer, in units; twice the heads must divide it")
    layers: Positive = setting(2, "number of transformer blocks")
    heads: Positive = setting(4, "attention heads; twice their number must divide hidden_size")
    steps: Positive = setting(800, "optimizer steps of the supervised warm-up that makes the model")
    batch_size: Positive = setting(128, "demonstrations per warm-up step")
    lr: PositiveFloat = setting(1e-3, "peak learning rate of the warm-up")
    error_rate: Fraction = setting(
        0.5, "share of the demonstrations that show a wrong answer; a higher one leaves GRPO more to learn"
    )
    seed: NonNegative = setting(0, "seed of the initial weights and of the demonstrations")


class LoraConfig(Section, resume=False, compared=True, varies=True, secret=False, evaluation=False):
    """A low-rank adapter, trained in the place of the model's own weights."""

    rank: NonNegative | None = setting(None, "rank of the adapter; null or 0: no adapter, all weights are trained")
    alpha: Positive = setting(32, "scale of the adapter: its output is multiplied by alpha / rank")
    targets: (
        Literal["all-linear"]
        | Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1), BeforeValidator(as_tuple)]
    ) = setting(
        "all-linear",
        "layers that get an adapter: all-linear (every linear layer but the output), or a list of names "
        "such as [q_proj, v_proj]",
    )


class ModelConfig(Section, resume=False, compared=True, varies=True, secret=False, evaluation=False):
    """The model that is trained: where it comes from and how it computes."""

    train_id: str = setting(
        "Qwen/Qwen2.5-1.5B", "model to train: tiny (the embedded one), a hub id, a local folder or a checkpoint"
    )
    ref_id: str | None = setting(None, "reference model of the KL term; null: the model as it was before training")
    device: Device = setting(
        "auto", "where the model is trained; auto: the first CUDA GPU, else the CPU", resume=True, compared=False
    )
    ref_device: GivenDevice | None = setting(
        None,
        "where the reference model computes, whole in each process; null: on the device of the trained model, and in "
        "shards if that is",
        resume=True,
    )
    dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "number type of the computation; weights and optimizer state stay float32"
    )
    frozen_dtype: Literal["float32", "bfloat16"] = setting(
        "float32",
        "number type in which weights that are not trained are stored: the base of an adapter, the reference model",
    )
    quantization: Literal["none", "nf4"] = setting(
        "none", "nf4: linear layers of an adapter's base model are stored in 4 bits (needs bitsandbytes)"
    )
    cast_lm_head_to_fp32: bool = setting(
        False,
        "compute the output layer in float32 where model.dtype is bfloat16, in training and in sampling here alike",
    )
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] | None = (
        setting(
            None,
            "attention kernel, by its name in transformers; null: as transformers chooses, which is sdpa for "
            "most models",
        )
    )
    forward_pass: Literal["auto", "transformers"] = setting(
        "auto",
        "auto: faster forward passes of this package if a trial shows that they agree with the model; "
        "transformers: always the model's own modules and cache",
    )
    gradient_checkpointing: bool = setting(
        False, "compute activations again in the backward pass: less memory, about a third more work"
    )
    chat_template: Literal["auto", "none"] = setting(
        "auto",
        "auto: prompts go through the tokenizer's chat template if it has one; none: plain text",
        varies=False,
        evaluation=True,
    )
    chat_template_kwargs: dict[str, JsonValue] = setting(
        {},
        "arguments of the tokenizer's chat template, such as {enable_thinking: false}",
        varies=False,
        evaluation=True,
    )
    trust_remote_code: bool = setting(False, "let a hub model run the Python code that comes with it")
    lora: LoraConfig = LoraConfig()
    tiny: TinyConfig = TinyConfig()
