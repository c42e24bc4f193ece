"""A place in a transformers model where attention can be taken over for one forward pass.

Everything else in a transformer works on tokens one by one. So one row can hold many sequences without padding, as long
as attention knows which token belongs to which: a `Packed` object, passed to the model's forward as the argument
`packed`, says so. Without it the model computes what it always does.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "sdpa_or_packed"
_NOT_PLAIN = ("softcap", "s_aux", "position_bias")  # what makes attention another function


class Packed(Protocol):
    """Attention over the tokens of one packed row.

    `longest`: how many tokens the longest sequence in it has, or will have once it has grown.
    """

    longest: int

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Return (tokens, heads, D) from `query` (tokens, heads, D), `key` and `value` (tokens, key heads, D)."""
        ...


def allow_packing(model: Any) -> bool:
    """Let the model take a `packed` argument; False where its attention cannot be replaced."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)
    return bool(model.config._attn_implementation == NAME)


def require_reach(window: int | None, packed: Packed) -> None:
    """Raise NotImplementedError where a window is shorter than a sequence: `Packed` looks at all that comes before."""
    if window is not None and packed.longest > window:
        raise NotImplementedError(f"its attention has a window of {window} tokens, and rows are longer")


def packed_forward(model: Any, ids: Tensor, positions: Tensor, packed: Packed, picks: Tensor | int) -> Tensor:
    """Run the model on packed tokens `ids` (N,) at `positions` (N,); return the logits (len(picks), V) at `picks`.

    `picks` 0 means all of them, as it does to transformers.
    """
    nothing = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)  # 4-d masks are taken as they are: none made
    out = model(
        input_ids=ids[None],
        position_ids=positions[None],
        attention_mask=nothing,
        use_cache=False,
        logits_to_keep=picks,
        packed=packed,
    )
    logits: Tensor = out.logits[0]
    return logits


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    packed: Packed | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Take `query` (1, heads, N, D) and the like as transformers gives them; return (1, N, heads, D)."""
    if packed is None:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return found
    for name in _NOT_PLAIN:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"its attention has a {name}")
    require_reach(kwargs.get("sliding_window"), packed)
    layer: Any = module.layer_idx
    rows = [part[0].transpose(0, 1) for part in (query, key, value)]
    return packed.attend(layer, rows[0], rows[1], rows[2], scaling)[None], None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
