"""A causal language model with its tokenizer, and the log-probabilities of completions under it.

Rows are prompt + completion, padded on the right only. A causal model never looks to the right, so padding needs no
attention mask and cannot change a real token's logits.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from grpo_mlflow.config import ModelConfig
from grpo_mlflow.errors import ConfigError
from grpo_mlflow.forward import layers
from grpo_mlflow.model import export, lora, merging, quantized, reading, sharding
from grpo_mlflow.types import Problem, Prompt


@dataclass(frozen=True, slots=True)
class Policy:
    """A model in evaluation mode (dropout off, so that sampled and trained log-probs agree) and its tokenizer.

    `adapter_off`: the policy is the base model of one with an adapter, and shares its weights (see `weights`).
    `written_out`: passes of our own may stand in for transformers' modules (`model.forward_pass`).
    `sampled`: only so many tokens are possible in a completion, up to the last that the tokenizer knows or that ends
    it; None: all of the model. `served`: its rollouts are a server's, which samples all of the model. `name`: what it
    was loaded from. `template_settings`: arguments of the chat template. `longest`: beyond so many tokens of a text the
    model computes in ways that were not tried; None: in none.
    """

    model: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    eos_ids: tuple[int, ...]
    pad_id: int
    adapter_off: bool = False
    written_out: bool = True
    sampled: int | None = None
    served: bool = False
    name: str = ""
    template_settings: Mapping[str, Any] = field(default_factory=dict)
    longest: int | None = None

    @property
    def vocabulary(self) -> int:
        """How many tokens the model has up to the last one that the tokenizer knows, whose ids may have holes."""
        embedded: int = self.model.get_input_embeddings().weight.shape[0]
        return embedded if self.tokenizer is None else min(embedded, max(self.tokenizer.get_vocab().values()) + 1)

    @property
    def priced(self) -> int | None:
        """How many tokens were possible in its rollouts, as `sampled`; those of its evaluations may be fewer."""
        return None if self.served else self.sampled

    @property
    def positions(self) -> int | None:
        """How many tokens a text may have; None: the model does not say."""
        found: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return found

    @property
    def has_adapter(self) -> bool:
        return lora.has_adapter(self.model)

    def prompt(self, problem: Problem, *, opens: bool = True) -> Prompt:
        """Return the problem's messages through the chat template, or joined where the tokenizer has none.

        Args:
            opens: whether the template opens the answer at the end.
        """
        messages = [dict(message) for message in problem.messages]
        if self.tokenizer.chat_template:
            ids = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=opens, return_dict=False, **self.template_settings
            )
        else:
            ids = self.tokenizer("\n\n".join(message["content"] for message in messages)).input_ids
        return Prompt(problem.id, problem.messages, tuple(ids))

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each row of token ids without special tokens."""
        texts: list[str] = self.tokenizer.batch_decode([list(row) for row in rows], skip_special_tokens=True)
        return texts

    def autocast(self) -> AbstractContextManager[None]:
        """Compute in `dtype` inside the block; weights stay float32. Those in shards have that type when gathered."""
        casts = self.dtype != torch.float32 and not sharding.is_sharded(self.model)
        return torch.autocast(self.device.type, self.dtype, enabled=casts)

    def base(self) -> Policy:
        """Return the base model of a model with an adapter: the same weights, the adapter off in `weights` blocks."""
        return replace(self, adapter_off=True)

    def weights(self) -> AbstractContextManager[None]:
        """Compute with this policy's weights inside the block; only that of a `base` needs one."""
        return lora.switched_off(self.model) if self.adapter_off else nullcontext()

    def merged(self) -> Policy:
        """Return the same policy as a plain model, all its weights trainable; it takes over the weights of this one."""
        return replace(self, model=merging.merged(self.model).requires_grad_(True))

    def save(self, folder: Path) -> None:
        """Write a Hugging Face model folder; of a model with an adapter only the adapter, which names its base.

        All processes of a model in shards call this, or the first in `sharding.leading`; the first writes.
        """
        self._save(folder, export.save_adapter if self.has_adapter else export.save)

    def save_plain(self, folder: Path) -> None:
        """As `save`, a folder that needs no other: an adapter is merged into the weights."""
        self._save(folder, export.save_merged if self.has_adapter else export.save)

    def _save(self, folder: Path, write: Callable[[Any, Path], None]) -> None:
        if not sharding.is_first(self.model):
            sharding.take_part(self.model)
            return
        transformers_logging.disable_progress_bar()
        with sharding.leading(self.model):
            write(self.model, folder)
        self.tokenizer.save_pretrained(folder)
        for weights in folder.glob("*.safetensors"):
            # safetensors lets nobody but the owner read its files: a server of another user could not
            shutil.copymode(folder / "tokenizer_config.json", weights)


@dataclass(frozen=True, slots=True)
class Stored:
    """How a model's own weights are stored. An adapter is float32 anyway.

    `dtype`: the type of the matrices. `in_4_bits`: those of linear layers as NF4. Both are for models that are not
    trained. `float32_head`: the output layer computes in float32, whatever the others do.
    """

    dtype: torch.dtype = torch.float32
    in_4_bits: bool = False
    float32_head: bool = False


FLOAT32 = Stored()


def load_as(settings: ModelConfig, source: str | Path, device: torch.device, *, frozen: bool = False) -> Policy:
    """Load a model the way the config says; see `load`. `frozen`: none of its own weights will be trained."""
    return load(
        source,
        device,
        settings.dtype,
        trust_remote_code=settings.trust_remote_code,
        attn_implementation=settings.attn_implementation,
        chat=settings.chat_template == "auto",
        template_settings=settings.chat_template_kwargs,
        written_out=settings.forward_pass == "auto",
        stored=Stored(
            getattr(torch, settings.frozen_dtype) if frozen else torch.float32,
            in_4_bits=frozen and settings.quantization == "nf4",
            float32_head=settings.cast_lm_head_to_fp32,
        ),
    )


def load(
    source: str | Path,
    device: torch.device,
    dtype: str = "float32",
    *,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    chat: bool = True,
    template_settings: Mapping[str, Any] = MappingProxyType({}),
    written_out: bool = True,
    stored: Stored = FLOAT32,
) -> Policy:
    """Load a hub id or a folder with float32 weights; `dtype` is that of the computation.

    A folder with a LoRA adapter gives its base model with the adapter in it, and only the adapter trainable. Without
    `chat` the tokenizer's chat template is dropped.

    Raises:
        ModelError: its files are not those of a causal language model with its tokenizer, complete and undamaged.
        UserError: the hub cannot be reached.
    """
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own: each line came twice
    base = lora.base_of(source)
    name = base or source
    config = reading.read_config(name, trust_remote_code=trust_remote_code)
    tokenizer = reading.read_tokenizer(source, trust_remote_code=trust_remote_code)
    others = {"attn_implementation": attn_implementation, **quantized.arguments(stored.in_4_bits, device)}
    model = reading.read_model(name, config, trust_remote_code=trust_remote_code, **others)
    _store(model, stored, name, dtype)  # before it is moved: a GPU never holds what is too large for it
    model.to(device).eval()
    reading.require_finite(name, dict(model.named_parameters()))
    if base is not None:
        lora.read(model, Path(source))
    reading.require_tokens_inside(source, tokenizer, model)
    if not chat:
        tokenizer.chat_template = None
    if tokenizer.chat_template:
        reading.require_template(source, tokenizer, template_settings)
    eos_ids = reading.end_ids(source, tokenizer, model)
    pad_id, kind = reading.pad_id(tokenizer, model, eos_ids), getattr(torch, dtype)
    found = Policy(model, tokenizer, device, kind, eos_ids, pad_id, written_out=written_out, name=str(source))
    # an end that the tokenizer has no token for must be possible: else completions would never end
    possible: int | None = max(found.vocabulary, eos_ids[-1] + 1)
    possible = None if possible == model.get_input_embeddings().weight.shape[0] else possible
    found = replace(found, template_settings=template_settings, sampled=possible)
    low = (attn_implementation or "").startswith("flash")  # it takes no float32
    with found.autocast() if low else nullcontext():
        reading.require_causal(source, model)
    return found


def _store(model: Any, stored: Stored, name: str | Path, dtype: str) -> None:
    """Let a model that was just read store its weights so.

    Raises:
        ConfigError: its output layer cannot compute in float32.
    """
    if stored.in_4_bits:
        quantized.take_over(model)
    if stored.dtype != torch.float32:
        layers.store(model, stored.dtype)
    if stored.in_4_bits or stored.dtype != torch.float32:
        for parameter in model.parameters():
            if parameter.dtype == torch.float32:  # it may be a view of the file, all of which would stay in memory
                parameter.data = parameter.data.clone()
    if not stored.float32_head or dtype == "float32":
        return
    try:
        layers.use_float32(model)
    except NotImplementedError as error:
        raise ConfigError(f"model.cast_lm_head_to_fp32 = true: of {str(name)!r}, {error}; allowed: false") from error


def empty_model(settings: ModelConfig, source: str | Path) -> Any:
    """Return the model of a hub id or folder without numbers in its parameters; of an adapter, its base.

    Raises:
        ModelError: its config.json is not that of a causal language model.
    """
    transformers_logging.disable_progress_bar()
    base = lora.base_of(source) or source
    config = reading.read_config(base, trust_remote_code=settings.trust_remote_code)
    made = reading.empty_model(
        base,
        config,
        trust_remote_code=settings.trust_remote_code,
        attn_implementation=settings.attn_implementation,
    )
    return made.eval()


def load_empty(settings: ModelConfig, like: Policy, adapter: Any, stored: torch.dtype) -> Policy:
    """Return a policy as `like`, one of another process without its model, with a model that has no numbers yet.

    Args:
        adapter: the settings of its adapter, None if it has none.
        stored: the type of its frozen matrices.
    """
    tokenizer = reading.read_tokenizer(like.name, trust_remote_code=settings.trust_remote_code)
    if settings.chat_template != "auto":
        tokenizer.chat_template = None
    model = empty_model(settings, like.name)
    _store(model, Stored(stored, float32_head=settings.cast_lm_head_to_fp32), like.name, settings.dtype)
    if adapter is not None:
        lora.put_in(model, adapter)
    return replace(like, model=model, tokenizer=tokenizer)
