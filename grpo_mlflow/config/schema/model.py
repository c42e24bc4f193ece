"""The model that is trained: where it comes from, its adapter, and the recipe of the embedded one."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, JsonValue

from grpo_mlflow.config.fields import Fraction, NonNegative, Positive, PositiveFloat, Section, as_tuple, setting


class TinyConfig(Section, resume=False, compared=True, varies=True, secret=False, evaluation=False):
    """The recipe of the embedded model; any change makes another model in the cache."""

    hidden_size: Positive = setting(128, "width of the transformer")
    layers: Positive = setting(2, "number of transformer blocks")
    heads: Positive = setting(4, "attention heads; must divide hidden_size")
    steps: Positive = setting(800, "supervised warm-up steps")
    batch_size: Positive = setting(128, "demonstrations per warm-up step")
    lr: PositiveFloat = setting(1e-3, "peak learning rate of the warm-up")
    error_rate: Fraction = setting(0.5, "share of demonstrations with a wrong answer")
    seed: NonNegative = setting(0, "seed of the initial weights and of the demonstrations")


class LoraConfig(Section, resume=False, compared=True, varies=True, secret=False, evaluation=False):
    """A low-rank adapter, trained in the place of the model's own weights."""

    rank: NonNegative | None = setting(None, "rank of the adapter; null or 0: none, all weights are trained")
    alpha: Positive = setting(32, "the adapter's output is scaled by alpha / rank")
    targets: (
        Literal["all-linear"]
        | Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(as_tuple), Field(min_length=1)]
    ) = setting("all-linear", "layers with an adapter: all-linear, or a list such as [q_proj, v_proj]")


class ModelConfig(Section, resume=False, compared=True, varies=True, secret=False, evaluation=False):
    train_id: str = setting("Qwen/Qwen2.5-1.5B", "model to train: `tiny`, a hub id or a local folder")
    ref_id: str | None = setting(None, "reference model of the KL term; null: the initial train_id")
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = setting(
        "auto", "auto, cpu, cuda or cuda:N", resume=True, compared=False
    )
    ref_device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] | None = setting(
        None, "device of the reference model: cpu, cuda or cuda:N; null: that of the trained one", resume=True
    )
    dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "type of the computation; weights and optimizer stay float32"
    )
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] | None = (
        setting(None, "how attention is computed; null: as transformers chooses, which is sdpa for most")
    )
    forward_pass: Literal["auto", "transformers"] = setting(
        "auto",
        "auto: our own passes if a trial shows that they agree with the model; transformers: always the model's own "
        "modules and cache",
    )
    gradient_checkpointing: bool = setting(
        False, "compute activations again in the backward pass: less memory, about a third more work"
    )
    chat_template: Literal["auto", "none"] = setting(
        "auto",
        "auto: prompts through the tokenizer's chat template where it has one; none: plain text",
        varies=False,
        evaluation=True,
    )
    chat_template_kwargs: dict[str, JsonValue] = setting(
        {},
        "arguments of the tokenizer's chat template, such as {enable_thinking: false}",
        varies=False,
        evaluation=True,
    )
    trust_remote_code: bool = setting(False, "let a hub model run its own Python code")
    lora: LoraConfig = LoraConfig()
    tiny: TinyConfig = TinyConfig()
