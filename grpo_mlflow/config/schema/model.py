"""The model that is trained: where it comes from, its adapter, and the recipe of the embedded one."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from grpo_mlflow.config.fields import Fraction, NonNegative, Positive, PositiveFloat, Section, as_tuple


class TinyConfig(Section):
    """The recipe of the embedded model; any change makes another model in the cache."""

    hidden_size: Positive = Field(128, description="width of the transformer")
    layers: Positive = Field(2, description="number of transformer blocks")
    heads: Positive = Field(4, description="attention heads; must divide hidden_size")
    steps: Positive = Field(800, description="supervised warm-up steps")
    batch_size: Positive = Field(128, description="demonstrations per warm-up step")
    lr: PositiveFloat = Field(1e-3, description="peak learning rate of the warm-up")
    error_rate: Fraction = Field(0.5, description="share of demonstrations with a wrong answer")
    seed: NonNegative = Field(0, description="seed of the initial weights and of the demonstrations")


class LoraConfig(Section):
    """A low-rank adapter, trained in the place of the model's own weights."""

    rank: NonNegative | None = Field(None, description="rank of the adapter; null or 0: none, all weights are trained")
    alpha: Positive = Field(32, description="the adapter's output is scaled by alpha / rank")
    targets: (
        Literal["all-linear"]
        | Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(as_tuple), Field(min_length=1)]
    ) = Field("all-linear", description="layers with an adapter: all-linear, or a list such as [q_proj, v_proj]")


class ModelConfig(Section):
    train_id: str = Field("Qwen/Qwen2.5-1.5B", description="model to train: `tiny`, a hub id or a local folder")
    ref_id: str | None = Field(None, description="reference model of the KL term; null: the initial train_id")
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = Field(
        "auto", description="auto, cpu, cuda or cuda:N"
    )
    ref_device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] | None = Field(
        None, description="device of the reference model: cpu, cuda or cuda:N; null: that of the trained one"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="type of the computation; weights and optimizer stay float32"
    )
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] | None = (
        Field(None, description="how attention is computed; null: as transformers chooses, which is sdpa for most")
    )
    gradient_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass: less memory, about a third more work"
    )
    chat_template: Literal["auto", "none"] = Field(
        "auto", description="auto: prompts through the tokenizer's chat template where it has one; none: plain text"
    )
    trust_remote_code: bool = Field(False, description="let a hub model run its own Python code")
    lora: LoraConfig = LoraConfig()
    tiny: TinyConfig = TinyConfig()
