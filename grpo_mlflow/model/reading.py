"""A tokenizer and a model as transformers reads them, refused where it would go on with something else.

It initialises weights that the files lack at random, leaves out tensors that it has no place for, makes an encoder a
language model that sees what comes next, and finds out about a broken chat template at the first prompt. Each would
train, and learn nothing or something else.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from grpo_mlflow.errors import ModelError, UserError, one_line
from grpo_mlflow.model import folder

_NO_DECODER = "no causal language model; allowed: a decoder such as qwen2 or llama"
_NAMED = 3  # tensors that a line names
# Buffers that earlier versions of transformers wrote: computed again, never trained.
_HARMLESS = re.compile(
    r"(^|\.)(rotary_emb|rotary_pos_emb)\.inv_freq$|(^|\.)position_ids$|\.(attn|attention)\.(masked_)?bias$"
)
_TOLD_HERE = ("LOAD REPORT", "as a standalone")  # words of transformers' warnings about what is refused here in a line


def read_config(name: str | Path, *, trust_remote_code: bool) -> Any:
    """Return the settings of the causal language model in a folder or hub id.

    Raises:
        ModelError: the folder lacks files or holds damaged ones, or the model is of another kind.
        UserError: the hub cannot be reached.
    """
    folder.require_weights(name)
    with _one_line(name, "its config.json"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    own = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if getattr(config, "is_encoder_decoder", False) or not (own or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING):
        raise ModelError(f"model {str(name)!r}: is of type {config.model_type}, {_NO_DECODER}")
    text = config.get_text_config()
    pad, rows = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if isinstance(pad, int) and isinstance(rows, int) and not 0 <= pad < rows:
        text.pad_token_id = None  # the embeddings would refuse it; any token can stand for padding
    return config


def read_tokenizer(source: str | Path, *, trust_remote_code: bool) -> Any:
    """Return the tokenizer of a folder or hub id.

    Raises:
        ModelError: its files are missing or broken, or it turns plain text into no tokens.
        UserError: the hub cannot be reached.
    """
    folder.require_tokenizer(source)
    with _one_line(source, "its tokenizer"):
        tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        ids = set(tokenizer("1 + 2 = 3", add_special_tokens=False).input_ids)
    if not ids - {tokenizer.unk_token_id}:
        raise ModelError(
            f"model {str(source)!r}: its tokenizer knows no text, as without its vocabulary; allowed: a folder or hub "
            "id with tokenizer.json, or what its tokenizer was made from"
        )
    return tokenizer


def require_template(source: str | Path, tokenizer: Any, settings: Mapping[str, Any]) -> None:
    """Refuse a chat template that cannot render one message of a user with the arguments `settings`.

    Raises:
        ModelError: the line says what the template fails with.
    """
    named = tokenizer.chat_template
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "1 + 2 ="}], add_generation_prompt=True, **settings)
    except Exception as error:  # a template is a program, and may raise anything
        if isinstance(named, dict) and not {"default", settings.get("chat_template")} & set(named):
            raise ModelError(
                f"model {str(source)!r}: has several chat templates ({', '.join(sorted(named))}), none of them named "
                "default; allowed: model.chat_template_kwargs='{chat_template: NAME}' with one of these names, or "
                "model.chat_template=none"
            ) from error
        place = f" in line {error.lineno}" if hasattr(error, "lineno") else ""
        raise ModelError(
            f"model {str(source)!r}: its chat template fails{place}: {reason(error)}; allowed: one that renders a "
            "message of role user, or model.chat_template=none"
        ) from error


def require_tokens_inside(source: str | Path, tokenizer: Any, model: Any) -> None:
    """Refuse a tokenizer of a larger model: its tokens have no embedding.

    Special tokens may lie outside: some models leave out those of images, which no text contains.

    Raises:
        ModelError: the line names the first such token.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    vocabulary = tokenizer.get_vocab()
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    outside = {index: token for token, index in vocabulary.items() if index >= rows and index not in special}
    if outside:
        first = min(outside)
        raise ModelError(
            f"model {str(source)!r}: {len(outside)} tokens of its tokenizer lie outside the {rows} rows of the "
            f"embeddings, the first {outside[first]!r} = {first}; allowed: the tokenizer of this model"
        )


def end_ids(source: str | Path, tokenizer: Any, model: Any) -> tuple[int, ...]:
    """Return the ids of the tokens that end a completion, in order.

    Raises:
        ModelError: there are none, or none that the model can sample.
    """
    named = model.generation_config.eos_token_id if model.generation_config is not None else None
    found = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}
    rows = model.get_input_embeddings().weight.shape[0]
    if not any(0 <= index < rows for index in found):
        which = f"has {sorted(found)} as end-of-sequence tokens" if found else "names no end-of-sequence token"
        raise ModelError(
            f"model {str(source)!r}: {which}; allowed: eos_token in tokenizer_config.json, or eos_token_id in "
            f"generation_config.json, from 0 to {rows - 1}"
        )
    return tuple(sorted(index for index in found if 0 <= index < rows))  # the others are never sampled


def pad_id(tokenizer: Any, model: Any, ends: Collection[int]) -> int:
    """Return the id that stands for padding: any that the model has an embedding for will do."""
    named = tokenizer.pad_token_id
    inside = named is not None and named < model.get_input_embeddings().weight.shape[0]
    return int(named) if inside else min(ends)


def read_model(
    name: str | Path, config: Any, *, trust_remote_code: bool, attn_implementation: str | None, **others: Any
) -> Any:
    """Return the model of a folder or hub id with float32 weights, all of them from its files.

    Args:
        others: further arguments of `from_pretrained`.

    Raises:
        ModelError: its files are damaged or not those of the model that `config` describes.
        UserError: the hub cannot be reached.
    """
    with _one_line(name, "its weights"), _told_here():
        model, found = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told below, with their names
            **others,
        )
    _require_all(found, name)
    return model


def empty_model(name: str | Path, config: Any, *, trust_remote_code: bool, attn_implementation: str | None) -> Any:
    """Return the model that `config` describes without numbers in its parameters, which take no memory.

    Raises:
        ModelError: it cannot be made like that.
    """
    with _one_line(name, "its config.json"), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code, attn_implementation=attn_implementation
        )
    model.tie_weights()
    return model


def _require_all(found: Mapping[str, Any], name: str | Path) -> None:
    """Refuse a model whose files do not hold exactly its tensors; tied weights and buffers count once."""
    changed = sorted(f"{key} {tuple(inside)} instead of {tuple(own)}" for key, inside, own in found["mismatched_keys"])
    unexpected = {key for key in found["unexpected_keys"] if not _HARMLESS.search(key)}
    for what, names in (
        ("of another shape than config.json says", changed),
        ("missing in its files", found["missing_keys"]),
        ("in its files but not in the model", unexpected),
    ):
        if names:
            raise ModelError(
                f"model {str(name)!r}: {counted(names)} {what}; allowed: files with all tensors of the model that "
                "config.json describes, and no others"
            )


def counted(names: Collection[str]) -> str:
    """Return how many tensors these are, and the first few of them, as the subject of a line."""
    shown = ", ".join([*sorted(names)[:_NAMED], *(["..."] if len(names) > _NAMED else [])])
    return f"1 tensor ({shown}) is" if len(names) == 1 else f"{len(names)} tensors ({shown}) are"


def require_finite(source: str | Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights with an infinity or NaN.

    Raises:
        ModelError: the line names the first tensors.
    """
    odd = [name for name, tensor in tensors.items() if tensor.numel() and not _is_finite(tensor)]
    if odd:
        raise ModelError(f"model {str(source)!r}: {counted(odd)} not finite (NaN or infinity); allowed: finite weights")


def _is_finite(tensor: torch.Tensor) -> bool:
    low, high = torch.aminmax(tensor.detach())  # one pass, and NaN shows in both
    return bool(torch.isfinite(low) & torch.isfinite(high))


@torch.no_grad()
def require_causal(source: str | Path, model: Any) -> None:
    """Refuse a model in which a token changes what is predicted before it: an encoder, or a prefix model.

    Raises:
        ModelError: it does, or a forward pass fails.
    """
    last = model.get_input_embeddings().weight.shape[0] - 1
    ids = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, last, last // 2]], device=model.device).clamp(max=last)
    with _one_line(source, "its forward pass"):
        logits = model(input_ids=ids, use_cache=False).logits[:, :3].float()
    spread = logits.amax(dim=-1) - logits.amin(dim=-1)
    if bool(((logits[0] - logits[1]).abs().amax(dim=-1) > 1e-4 * spread.amax(dim=0)).any()):
        raise ModelError(
            f"model {str(source)!r}: {type(model).__name__} predicts a token from later ones, {_NO_DECODER}"
        )


@contextmanager
def _one_line(name: str | Path, what: str) -> Iterator[None]:
    """Turn whatever a library makes of broken files into one line about `what` of the model `name`."""
    try:
        yield
    except Exception as error:  # libraries raise all kinds for files that they do not expect
        if Path(name).is_dir():
            found = f"model {str(name)!r}: {what} cannot be used: {reason(error)}; {folder.SAVED}"
            raise ModelError(found) from error
        hint = "" if "/" in str(name) else " (is its hub id ORG/NAME?)"
        away = isinstance(error.__cause__, LocalEntryNotFoundError)  # a hub that cannot be reached may be later
        kind = UserError if away else ModelError
        raise kind(f"model {str(name)!r} cannot be loaded{hint}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Return what a library says, in one line, with the kind of the error where that alone is no sentence."""
    told = one_line(error)
    return told if isinstance(error, (OSError, ValueError, ImportError)) and told else f"{type(error).__name__}: {told}"


@contextmanager
def _told_here() -> Iterator[None]:
    """Keep the tables out of the output that transformers prints about tensors which are refused in one line."""

    def other(record: logging.LogRecord) -> bool:
        return not any(words in record.getMessage() for words in _TOLD_HERE)

    # Those of the root as well: where the variable CI is set, transformers passes its lines on to them.
    handlers = [*logging.getLogger("transformers").handlers, *logging.getLogger().handlers]
    for handler in handlers:
        handler.addFilter(other)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(other)
