"""Log-probabilities of completions in padded rows: the plain forward pass that every other is compared with.

Rows are prompt + completion, padded on the right only. A causal model never looks to the right, so padding needs no
attention mask and cannot change a real token's logits.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from grpo_mlflow.forward.token_head import IMPOSSIBLE


def completion_logprobs(
    model: Any,
    input_ids: Tensor,
    prompt_lengths: Tensor,
    completion_width: int,
    temperature: float,
    entropy_gradient: bool = False,
    sampled: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and entropies of completion tokens, both (B, completion_width), in float32.

    `input_ids` (B, L) holds prompt and completion, padded on the right; `prompt_lengths` is (B,). The distribution is
    softmax(logits / temperature), the one that was sampled from. Places past the end of a completion hold the values
    of padding: mask them. The entropy has a gradient only where asked for: it costs another full-vocabulary pass. Only
    the first `sampled` tokens are possible, others have a log-probability of about -1e30; None: all.
    """
    width = input_ids.shape[1]
    first = int(prompt_lengths.min()) - 1  # the logits of earlier positions are never looked at
    keep = width - first
    kwargs = {"logits_to_keep": keep} if keeps_logits(model) else {}
    logits = model(input_ids=input_ids, use_cache=False, **kwargs).logits[:, -keep:, :sampled]
    places = prompt_lengths[:, None] + torch.arange(completion_width, device=input_ids.device)[None, :]
    places = places.clamp(max=width - 1)
    picked = logits.gather(1, (places - 1 - first)[:, :, None].expand(-1, -1, logits.shape[-1]))
    logprobs = torch.log_softmax(picked.float() / temperature, dim=-1)
    targets = input_ids.gather(1, places)[:, :, None]
    impossible = targets >= logits.shape[-1]  # so padding may be, which any token can stand for
    chosen = logprobs.gather(2, targets.masked_fill(impossible, 0)).masked_fill(impossible, IMPOSSIBLE).squeeze(2)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
    return chosen, entropy


def keeps_logits(model: Any) -> bool:
    """Return whether the model can be asked for the logits of the last positions only."""
    forward = getattr(model, "module", model).forward
    return "logits_to_keep" in inspect.signature(inspect.unwrap(forward)).parameters
