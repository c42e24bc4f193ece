"""Model folders as people bring them, each broken in one way: how, and what the line about it must hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    Qwen2ForSequenceClassification,
)

Break = Callable[[Path], object]
MODEL, ADAPTER, INDEX = "model.safetensors", "adapter_model.safetensors", "model.safetensors.index.json"


def edited(name: str, **changes: Any) -> Break:
    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | changes))

    return apply


def changed(change: Callable[[dict[str, Tensor]], object], name: str = MODEL) -> Break:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name, metadata={"format": "pt"})

    return apply


def without(*names: str) -> Break:
    def apply(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return apply


def written(name: str, content: bytes) -> Break:
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str, size: int) -> Break:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def sharded(folder: Path) -> None:
    """Split the weights into two files and an index."""
    tensors = load_file(folder / MODEL)
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for place in set(places.values()):
        part = {name: tensor for name, tensor in tensors.items() if places[name] == place}
        save_file(part, folder / place, metadata={"format": "pt"})
    (folder / MODEL).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def both(*steps: Break) -> Break:
    return lambda folder: [step(folder) for step in steps]


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / MODEL), folder / "pytorch_model.bin")
    (folder / MODEL).unlink()


def _first(value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors[min(tensors)].view(-1)[:1].fill_(value)


def _few_rows(tensors: dict[str, Tensor]) -> None:
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:200].clone()


def _encoder(folder: Path) -> None:
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(vocab_size=rows, **sizes)).save_pretrained(folder)


def _encoder_decoder(folder: Path) -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    config = BartConfig(vocab_size=317, encoder_attention_heads=2, decoder_attention_heads=2, **sizes)
    BartForConditionalGeneration(config).save_pretrained(folder)


def _classifier(folder: Path) -> None:
    Qwen2ForSequenceClassification.from_pretrained(folder).save_pretrained(folder)


def _setting(**changes: Any) -> Break:
    return edited("adapter_config.json", **changes)


_UP = "model.layers.1.mlp.up_proj.weight"
# Of a model: what breaks it, and what the line must hold
MODELS: dict[str, tuple[Break, list[str]]] = {
    # weights
    "a tensor is missing": (changed(lambda t: t.pop(_UP)), ["1 tensor", _UP, "missing"]),
    "a layer is missing": (
        edited("config.json", num_hidden_layers=3, layer_types=["full_attention"] * 3),
        ["12 tensors", "model.layers.2.input_layernorm.weight", "...", "missing"],
    ),
    "a tensor too many": (
        changed(lambda t: t.update({"v_head.weight": torch.ones(1, 32)})),
        ["v_head.weight", "not in the model"],
    ),
    "another shape": (
        edited("config.json", intermediate_size=64),
        ["6 tensors", "down_proj.weight (32, 128) instead of (32, 64)", "another shape"],
    ),
    "NaN": (changed(_first(float("nan"))), ["not finite", "model.embed_tokens.weight"]),
    "infinity": (changed(_first(float("inf"))), ["not finite", "model.embed_tokens.weight"]),
    "weights cut off": (cut(MODEL, 5000), [MODEL, "damaged"]),
    "weights cut off in their header": (cut(MODEL, 100), [MODEL, "damaged"]),
    "garbage as weights": (written(MODEL, b"garbage " * 99), [MODEL, "damaged"]),
    "empty weights": (written(MODEL, b""), [MODEL, "damaged"]),
    "no weights": (without(MODEL), [MODEL, "missing"]),
    "pickled weights": (_pickled, [MODEL, "missing", "pytorch_model.bin", "safetensors"]),
    "a shard is missing": (
        both(sharded, without("model-00002-of-00002.safetensors")),
        ["model-00002-of-00002.safetensors is missing"],
    ),
    "an index that is no JSON": (both(sharded, written(INDEX, b"{")), [INDEX, "cannot be read"]),
    "an index of a file beside the folder": (
        both(sharded, edited(INDEX, weight_map={"model.norm.weight": "../other/model.safetensors"})),
        [INDEX, "leads outside", "../other/model.safetensors"],
    ),
    "an index of a file elsewhere": (
        both(sharded, edited(INDEX, weight_map={"model.norm.weight": "/etc/hostname"})),
        [INDEX, "leads outside", "/etc/hostname"],
    ),
    "an index of nothing": (both(sharded, written(INDEX, b"{}")), [INDEX, "weight_map"]),
    # settings
    "settings that are no JSON": (written("config.json", b"{"), ["config.json cannot be read"]),
    "settings that are a list": (written("config.json", b"[]"), ["config.json cannot be read", "list"]),
    "settings that are no text": (written("config.json", b"\xff\xfe\0"), ["config.json cannot be read"]),
    "a size that is no number": (edited("config.json", hidden_size="a"), ["config.json", "hidden_size"]),
    "no heads": (edited("config.json", num_attention_heads=0), ["cannot be used", "ZeroDivisionError"]),
    "an unknown type": (edited("config.json", model_type="nonesuch"), ["config.json", "nonesuch"]),
    "no type": (written("config.json", b"{}"), ["config.json", "model_type"]),
    "an encoder": (_encoder, ["BertLMHeadModel", "no causal language model"]),
    "an encoder-decoder": (_encoder_decoder, ["bart", "no causal language model"]),
    "a classifier": (_classifier, ["score.weight", "not in the model"]),
    "generation settings that are no JSON": (
        written("generation_config.json", b"{"),
        ["generation_config.json cannot be read"],
    ),
    # tokenizer
    "the tokenizer is lost": (without("tokenizer.json"), ["tokenizer knows no text", "tokenizer.json"]),
    "the tokenizer's settings are lost": (without("tokenizer_config.json"), ["no tokenizer_config.json"]),
    "a tokenizer that is cut off": (cut("tokenizer.json", 4000), ["its tokenizer cannot be used"]),
    "a tokenizer of nothing": (written("tokenizer.json", b"{}"), ["its tokenizer cannot be used"]),
    "a tokenizer's settings that are no JSON": (
        written("tokenizer_config.json", b"{"),
        ["tokenizer_config.json cannot be read"],
    ),
    "the tokenizer of a larger model": (
        both(edited("config.json", vocab_size=200), changed(_few_rows)),
        ["117 tokens of its tokenizer", "200 rows", "= 200"],
    ),
    "no end-of-sequence token": (
        both(
            edited("tokenizer_config.json", eos_token=None),
            edited("config.json", eos_token_id=None),
            without("generation_config.json"),
        ),
        ["names no end-of-sequence token", "eos_token"],
    ),
    "an end-of-sequence token out of reach": (
        both(
            edited("tokenizer_config.json", eos_token=None),
            edited("generation_config.json", eos_token_id=999),
        ),
        ["[999]", "from 0 to 316"],
    ),
    # template
    "a template that does not parse": (
        written("chat_template.jinja", b"\n{% for m in messages %}{{ m.content }"),
        ["chat template fails in line 2", "model.chat_template=none"],
    ),
    "a template that asks for what is not there": (
        written("chat_template.jinja", b"{{ messages[0].content.parts.text }}"),
        ["chat template fails", "parts"],
    ),
    "a template that refuses": (
        written("chat_template.jinja", b"{{ raise_exception('no user') }}"),
        ["chat template fails", "no user"],
    ),
    # context
    "a short context": (
        edited("config.json", max_position_embeddings=8),
        ["generation.max_new_tokens = ", "8 positions", "less than 8"],
    ),
}
# Of an adapter
ADAPTERS: dict[str, tuple[Break, list[str]]] = {
    "settings of an adapter that are no JSON": (
        written("adapter_config.json", b"{"),
        ["adapter_config.json cannot be read"],
    ),
    "no base": (_setting(base_model_name_or_path=""), ["base_model_name_or_path", "names no model"]),
    "a base that is gone": (_setting(base_model_name_or_path="/no/base"), ["'/no/base', which is not there"]),
    "the weights of an adapter are lost": (without(ADAPTER), [ADAPTER, "missing"]),
    "the weights of an adapter are cut off": (cut(ADAPTER, 3000), [ADAPTER, "damaged"]),
    "a tensor of an adapter is missing": (
        changed(lambda t: t.pop(min(t)), ADAPTER),
        ["1 tensor", "down_proj.lora_A.weight", "missing"],
    ),
    "an adapter of more layers": (_setting(target_modules=["q_proj"]), ["24 tensors", "no part of"]),
    "an adapter of no layers": (_setting(target_modules=["nothing"]), ["nothing"]),
    "an adapter of another rank": (_setting(r=8), ["28 tensors", "(4, 128) instead of (8, 128)", "another shape"]),
    "a rank that is no number": (_setting(r="x"), ["its LoRA adapter cannot be loaded"]),
    "NaN in an adapter": (changed(_first(float("nan")), ADAPTER), ["not finite", "lora_A"]),
    "an adapter of the output layer": (_setting(target_modules=["lm_head"]), ["'lm_head' as a target"]),
    "an adapter of the embeddings": (_setting(target_modules=["embed_tokens"]), ["embed_tokens' as a target"]),
    "DoRA": (_setting(use_dora=True), ["use_dora = true", "not carried", "allowed: false"]),
    "other modules": (_setting(modules_to_save=["lm_head"]), ['modules_to_save = ["lm_head"]', "allowed: null"]),
    "biases of the base": (_setting(bias="all"), ['bias = "all"', 'allowed: "none"']),
    "a bias of its own": (_setting(lora_bias=True), ["lora_bias = true"]),
    "trained tokens": (_setting(trainable_token_indices=[7]), ["trainable_token_indices = [7]"]),
    "an adapter that begins at a token": (_setting(alora_invocation_tokens=[7]), ["alora_invocation_tokens"]),
    "PiSSA": (_setting(init_lora_weights="pissa"), ['init_lora_weights = "pissa"']),
    "an adapter of a classifier": (_setting(task_type="SEQ_CLS"), ['task_type = "SEQ_CLS"', '"CAUSAL_LM"']),
    "another kind of adapter": (_setting(peft_type="IA3"), ['peft_type = "IA3"', 'allowed: "LORA"']),
    "a setting of a later version": (_setting(use_tomorrow=True), ["use_tomorrow = true"]),
}
