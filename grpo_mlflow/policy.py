"""A causal language model with its tokenizer, and the log-probabilities of completions under it.

Rows are prompt + completion, padded on the right only. A causal model never looks to the right, so padding needs no
attention mask and cannot change a real token's logits.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from grpo_mlflow.errors import UserError
from grpo_mlflow.types import Problem, Prompt


@dataclass(frozen=True, slots=True)
class Policy:
    """A model in evaluation mode (dropout off, so that sampled and trained log-probs agree) and its tokenizer."""

    model: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    eos_ids: tuple[int, ...]
    pad_id: int

    def prompt(self, problem: Problem) -> Prompt:
        """Return the problem's messages through the chat template, or joined where the tokenizer has none."""
        messages = [dict(message) for message in problem.messages]
        if self.tokenizer.chat_template:
            ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        else:
            ids = self.tokenizer("\n\n".join(message["content"] for message in messages)).input_ids
        return Prompt(problem.id, problem.messages, tuple(ids))

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each row of token ids without special tokens."""
        texts: list[str] = self.tokenizer.batch_decode([list(row) for row in rows], skip_special_tokens=True)
        return texts

    def autocast(self) -> AbstractContextManager[None]:
        """Compute in `dtype` inside the block; weights stay float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def save(self, folder: Path) -> None:
        """Write a Hugging Face model folder."""
        transformers_logging.disable_progress_bar()
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def choose_device(device: str) -> torch.device:
    """Return the device of a config value; `auto` prefers CUDA, and one of several processes takes its own GPU.

    Raises:
        UserError: the device does not exist here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        count = torch.cuda.device_count()
        local = os.environ.get("LOCAL_RANK", "0") if count > 1 else 0  # a scheduler may show each process one GPU only
        index = int(device.partition(":")[2] or local)
        if index >= count:
            raise UserError(f"model.device = {device!r}: this machine has {count} CUDA devices; allowed: auto, cpu")
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    return torch.device(device)


def load(source: str | Path, device: torch.device, dtype: str = "float32", trust_remote_code: bool = False) -> Policy:
    """Load a hub id or a folder with float32 weights; `dtype` is that of the computation.

    Raises:
        UserError: there is no such model, or it cannot be read.
    """
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, trust_remote_code=trust_remote_code, use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"model {str(source)!r} cannot be loaded: {reason}") from error
    model.to(device).eval()
    eos = model.generation_config.eos_token_id if model.generation_config is not None else None
    eos_ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    if not eos_ids:
        raise UserError(f"model {str(source)!r} names no end-of-sequence token")
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(eos_ids)
    return Policy(model, tokenizer, device, getattr(torch, dtype), tuple(sorted(eos_ids)), pad_id)


def completion_logprobs(
    model: Any,
    input_ids: Tensor,
    prompt_lengths: Tensor,
    completion_width: int,
    temperature: float,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and entropies of completion tokens, both (B, completion_width), in float32.

    `input_ids` (B, L) holds prompt and completion, padded on the right; `prompt_lengths` is (B,). The distribution is
    softmax(logits / temperature), the one that was sampled from. Places past the end of a completion hold the values
    of padding: mask them. The entropy has a gradient only where asked for: it costs another full-vocabulary pass.
    """
    width = input_ids.shape[1]
    first = int(prompt_lengths.min()) - 1  # the logits of earlier positions are never looked at
    keep = width - first
    kwargs = {"logits_to_keep": keep} if keeps_logits(model) else {}
    logits = model(input_ids=input_ids, use_cache=False, **kwargs).logits[:, -keep:]
    places = prompt_lengths[:, None] + torch.arange(completion_width, device=input_ids.device)[None, :]
    places = places.clamp(max=width - 1)
    picked = logits.gather(1, (places - 1 - first)[:, :, None].expand(-1, -1, logits.shape[-1]))
    logprobs = torch.log_softmax(picked.float() / temperature, dim=-1)
    chosen = logprobs.gather(2, input_ids.gather(1, places)[:, :, None]).squeeze(2)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
    return chosen, entropy


def keeps_logits(model: Any) -> bool:
    """Return whether the model can be asked for the logits of the last positions only."""
    forward = getattr(model, "module", model).forward
    return "logits_to_keep" in inspect.signature(inspect.unwrap(forward)).parameters
