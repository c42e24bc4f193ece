"""What the settings of a model and its adapter ask of the others."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from grpo_mlflow.config.schema import Config

_OF_THE_PROGRAM = frozenset(
    {
        *("conversation", "messages", "add_generation_prompt", "continue_final_message", "tokenize"),
        *("padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "tokenizer_kwargs"),
    }
)
"""Arguments of transformers' `apply_chat_template` that a prompt of token ids depends on."""


def errors(config: Config) -> Iterator[str]:
    """Yield one line per contradiction: the key, its value and what is allowed."""
    for name in sorted(_OF_THE_PROGRAM & set(config.model.chat_template_kwargs)):
        yield (
            f"model.chat_template_kwargs = {config.model.chat_template_kwargs}: {name} is for the program to set; "
            "allowed: arguments that the template itself asks for, such as enable_thinking"
        )
    yield from _adapter(config)
    yield from _quantized(config)
    yield from _sharding(config)


def _quantized(config: Config) -> Iterator[str]:
    model, sync = config.model, config.generation.sync
    served = {config.generation.backend, config.eval.backend or config.generation.backend} != {"local"}
    fewer = f"model.quantization = {model.quantization!r}"
    if model.quantization != "none":
        if not model.lora.rank:
            yield f"{fewer}: weights in 4 bits cannot be trained; allowed: none, or model.lora.rank above 0"
        if find_spec("bitsandbytes") is None:
            yield (
                f"{fewer}: the package bitsandbytes is not installed; allowed: none, or this after "
                "pip install -e '.[quantized]' in the project's folder"
            )
    elif model.frozen_dtype != "float32" and model.frozen_dtype != model.dtype:
        fewer = f"model.frozen_dtype = {model.frozen_dtype!r}"
    else:
        return
    if served and model.lora.rank and sync in ("lora", "none"):
        yield (
            f"generation.sync = {sync!r}: the server would compute with the base model in {model.dtype}, and training "
            f"with {fewer}; allowed: reload, which sends it those weights"
        )


def _sharding(config: Config) -> Iterator[str]:
    if config.train.sharding == "none":
        return
    if config.model.quantization != "none":
        yield (
            f"model.quantization = {config.model.quantization!r}: with train.sharding = 'full' weights are cut by "
            "rows, which those packed in 4 bits do not have; allowed: none, or train.sharding=none"
        )


def _adapter(config: Config) -> Iterator[str]:
    model, sync = config.model, config.generation.sync
    rank = model.lora.rank
    if not rank:
        if sync == "lora":
            yield "generation.sync = 'lora': the model has no adapter; allowed: reload, or model.lora.rank above 0"
        return
    if find_spec("peft") is None:
        yield (
            f"model.lora.rank = {rank}: the package peft is not installed; allowed: null, or a rank after "
            "pip install -e '.[lora]' in the project's folder"
        )
    if model.ref_id not in (None, model.train_id):
        yield (
            f"model.ref_id = {model.ref_id!r}: with model.lora.rank = {rank} the reference is the trained model "
            f"without its adapter; allowed: null or {model.train_id!r}"
        )
    if model.ref_device is not None:
        yield (
            f"model.ref_device = {model.ref_device!r}: with model.lora.rank = {rank} the reference is the trained "
            "model without its adapter, not a second one; allowed: null"
        )
