"""From prompts to next-token logits, one token after another for K rows of each prompt, by one of two ways.

`PackedDecoder` keeps keys and values in buffers of its own: nothing is concatenated or masked anew for a token, prompts
are prefilled without padding, and grouped key heads are never repeated. `CacheDecoder` uses the model's own cache and
serves every architecture. Both give the same logits up to rounding, in the type of the autocast block around them.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from grpo_mlflow.attention import Packed, packed_forward
from grpo_mlflow.policy import Policy, keeps_logits
from grpo_mlflow.shared_prefix import reason_against

_GROWTH = 64  # columns by which the buffers grow


class Decoder(Protocol):
    """Rows of tokens that grow. `logits` (R, V) are those of each row's next token."""

    logits: Tensor

    def step(self, tokens: Tensor) -> None:
        """Append one token to each row: `tokens` (R,)."""
        ...

    def keep(self, index: Tensor) -> None:
        """Go on with some of the rows."""
        ...


def start(policy: Policy, prompts: Sequence[Sequence[int]], k: int, most: int) -> Decoder:
    """Prefill each prompt once and return a decoder of len(prompts) * k rows, k after k, for `most` tokens at most."""
    if reason_against(policy.model) is None:
        return PackedDecoder(policy, prompts, k, most)
    return CacheDecoder(policy, prompts, k)


class PackedDecoder(Packed):
    """Rows packed without padding; keys and values (R, key heads, columns, D) per layer, prompts flush right."""

    def __init__(self, policy: Policy, prompts: Sequence[Sequence[int]], k: int, most: int) -> None:
        self._policy, device = policy, policy.device
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        starts, width = lengths.cumsum(0) - lengths, int(lengths.max())
        places = starts[:, None] + torch.arange(width)[None, :]
        # (G, P) places in the packed row, flush left for the causal pass and flush right for the buffers
        self._left = places.where(torch.arange(width)[None, :] < lengths[:, None], 0).to(device)
        shift = (width - lengths)[:, None]
        self._right = (places - shift).where(torch.arange(width)[None, :] >= shift, 0).to(device)
        self._packed = (torch.arange(len(prompts)) * width - starts).repeat_interleave(lengths).to(device)
        self._k, self._column, self._prefilling = k, width, True
        self._room = width + min(most, _GROWTH)
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._positions = lengths.repeat_interleave(k).to(device)
        hidden = (torch.arange(width)[None, :] < shift).repeat_interleave(k, dim=0).to(device)
        mask = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, -torch.inf)
        self._mask = mask[:, None, None] if bool(shift.any()) else None  # (R, 1, 1, P)
        ids = torch.tensor([token for prompt in prompts for token in prompt], device=device)
        positions = torch.cat([torch.arange(int(n)) for n in lengths]).to(device)
        self._packed += torch.arange(len(ids), device=device)
        logits = packed_forward(policy.model, ids, positions, self, (starts + lengths - 1).to(device))
        self.logits = logits.repeat_interleave(k, dim=0)
        self._prefilling = False

    def step(self, tokens: Tensor) -> None:
        """See `Decoder.step`."""
        if self._mask is not None and self._mask.shape[-1] == self._column:
            self._mask = torch.nn.functional.pad(self._mask, (0, _GROWTH))
        self.logits = packed_forward(self._policy.model, tokens, self._positions, self, 0)
        self._column += 1
        self._positions = self._positions + 1

    def keep(self, index: Tensor) -> None:
        """See `Decoder.keep`."""
        for buffers in (self._keys, self._values):
            for layer, buffer in enumerate(buffers):
                buffers[layer] = buffer.index_select(0, index)
        self._positions = self._positions[index]
        self._mask = self._mask[index] if self._mask is not None else None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """See `Packed.attend`."""
        if self._prefilling:
            return self._prefill(query, key, value, scaling)
        rows, heads, size = query.shape
        keys = self._append(self._keys, layer, key)
        values = self._append(self._values, layer, value)
        # the heads that share a key head stand in the place of several queries: no position is hidden among them
        grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], size)
        mask = self._mask[..., : self._column + 1].to(query.dtype) if self._mask is not None else None
        found = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scaling)
        return found.reshape(rows, heads, size)

    def _append(self, buffers: list[Tensor], layer: int, new: Tensor) -> Tensor:
        """Write a column (R, key heads, D) and return all columns so far."""
        buffer = buffers[layer]
        if buffer.shape[2] == self._column:
            buffer = buffers[layer] = torch.cat(
                [buffer, buffer.new_empty(*buffer.shape[:2], _GROWTH, buffer.shape[3])], dim=2
            )
        buffer[:, :, self._column] = new
        return buffer[:, :, : self._column + 1]

    def _prefill(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Return the attention of prompts to themselves, and fill the buffers of the next layer."""
        count, width = self._left.shape
        for buffers, new in ((self._keys, key), (self._values, value)):
            placed = new[self._right].transpose(1, 2)  # (G, key heads, P, D)
            buffer = new.new_empty(count, self._k, new.shape[1], self._room, new.shape[2])
            buffer[:, :, :, :width] = placed[:, None]
            buffers.append(buffer.flatten(0, 1))
        q, k, v = (part[self._left].transpose(1, 2) for part in (query, key, value))
        shared = query.shape[1] != key.shape[1]
        found = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=shared)
        return found.transpose(1, 2).flatten(0, 1)[self._packed]


class CacheDecoder:
    """Rows padded on the left, with the cache that the model makes."""

    def __init__(self, policy: Policy, prompts: Sequence[Sequence[int]], k: int) -> None:
        self._policy = policy
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), policy.pad_id)
        mask = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        ids, mask = ids.to(policy.device), mask.to(policy.device)
        last = {"logits_to_keep": 1} if keeps_logits(policy.model) else {}
        out = self._forward(ids, mask, (mask.cumsum(dim=1) - 1).clamp(min=0), **last)
        self._cache = getattr(out, self._cache_name)
        self._cache.batch_repeat_interleave(k)
        self.logits = out.logits[:, -1].repeat_interleave(k, dim=0)
        self._mask = mask.repeat_interleave(k, dim=0)
        self._positions = self._mask.sum(dim=1)

    @property
    def _cache_name(self) -> str:
        forward = inspect.signature(inspect.unwrap(self._policy.model.forward))
        return "cache" if "cache" in forward.parameters else "past_key_values"

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, **others: Any) -> Any:
        return self._policy.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **others)

    def step(self, tokens: Tensor) -> None:
        """See `Decoder.step`."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], dim=1)
        cache = {self._cache_name: self._cache}
        out = self._forward(tokens[:, None], self._mask, self._positions[:, None], **cache)
        self.logits, self._positions = out.logits[:, -1], self._positions + 1

    def keep(self, index: Tensor) -> None:
        """See `Decoder.keep`."""
        self._cache.batch_select_indices(index)
        self._mask, self._positions = self._mask[index], self._positions[index]
