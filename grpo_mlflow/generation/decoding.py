"""From prompts to next-token logits, one token after another for K rows of each prompt, by one of two ways.

`PackedDecoder` keeps keys and values in buffers of its own: nothing is concatenated or masked anew for a token, prompts
are prefilled without padding, what they share once, and kept once for their k rows, and grouped key heads are never
repeated. `CacheDecoder` uses the model's own cache and serves every architecture. Both give the same logits up to
rounding, in the type of the autocast block around them.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from grpo_mlflow.attention import Packed, packed_forward
from grpo_mlflow.generation.llama_step import LlamaStep, can_step
from grpo_mlflow.policy import Policy, keeps_logits
from grpo_mlflow.prefix_tree import Tree, prompt_levels
from grpo_mlflow.shared_prefix import reason_against

_PLAIN = ("cpu", torch.float32)
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
    """G prompts x k rows, packed without padding. Per layer, keys and values of the prompts (G, key heads, P, D) stand
    once, beside buffers of each row's own tokens (R, key heads, columns, D); `slots` (R,) is prompt * k + number.

    Products with a prompt's keys and values are those of all its rows at once. Steps of a model of the Llama family are
    written out (`llama_step`), in float32 on a CPU.
    """

    def __init__(self, policy: Policy, prompts: Sequence[Sequence[int]], k: int, most: int) -> None:
        device = policy.device
        self._tree: Tree | None = Tree(prompt_levels(prompts), device)
        tree = self._tree
        beyond = torch.zeros(tree.filled.shape, device=device).masked_fill_(~tree.filled, -torch.inf)
        self._mask = None if bool(tree.filled.all()) else beyond[:, None, None]  # (G, 1, 1, P)
        self._k, self._column, self._room = k, 0, min(most, _GROWTH)
        self._prompt_keys: list[Tensor] = []
        self._prompt_values: list[Tensor] = []
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._slots = torch.arange(len(prompts) * k, device=device)
        self._positions = torch.tensor([len(prompt) for prompt in prompts], device=device).repeat_interleave(k)
        ends = (tree.starts[-1] + tree.lengths[-1] - 1).to(device)
        self.logits = packed_forward(policy.model, tree.ids, tree.positions, self, ends).repeat_interleave(k, dim=0)
        self._tree = None  # from here on rows of single tokens
        plain = (device.type, policy.dtype) == _PLAIN and can_step(policy.model)
        self._forward = LlamaStep(policy.model) if plain else partial(packed_forward, policy.model, picks=0)

    def step(self, tokens: Tensor) -> None:
        """See `Decoder.step`."""
        self.logits = self._forward(tokens, self._positions, self)
        self._column += 1
        self._positions = self._positions + 1

    def keep(self, index: Tensor) -> None:
        """See `Decoder.keep`."""
        for buffers in (self._keys, self._values):
            buffers[:] = [buffer.index_select(0, index) for buffer in buffers]
        self._positions = self._positions[index]
        slots = self._slots[index]
        prompts, owners = torch.unique(slots // self._k, return_inverse=True)
        self._slots = owners * self._k + slots % self._k
        if len(prompts) < len(self._prompt_keys[0]):
            for buffers in (self._prompt_keys, self._prompt_values):
                buffers[:] = [buffer.index_select(0, prompts) for buffer in buffers]
            self._mask = self._mask[prompts] if self._mask is not None else None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """See `Packed.attend`."""
        if self._tree is not None:
            found, keys, values = self._tree.attend_keeping(query, key, value, scaling)
            self._prompt_keys.append(keys.contiguous())
            self._prompt_values.append(values.contiguous())
            return found
        rows, heads, size = query.shape
        scale = size**-0.5 if scaling is None else scaling
        keys = self._append(self._keys, layer, key)
        values = self._append(self._values, layer, value)
        # the heads that share a key head stand in the place of several queries
        grouped = (query * scale).view(rows, key.shape[1], heads // key.shape[1], size)
        on_prompt = self._spread(grouped) @ self._prompt_keys[layer].transpose(2, 3)
        if self._mask is not None:
            on_prompt += self._mask
        scores = torch.cat([self._gather(on_prompt, grouped.shape[2]), grouped @ keys.transpose(2, 3)], dim=-1)
        shares = scores.softmax(dim=-1, dtype=torch.float32).to(values.dtype)
        prompt, own = shares.tensor_split([on_prompt.shape[-1]], dim=-1)
        of_prompt = self._gather(self._spread(prompt) @ self._prompt_values[layer], grouped.shape[2])
        return (of_prompt + own @ values).reshape(rows, heads, size)

    def _spread(self, rows: Tensor) -> Tensor:
        """Return (G, key heads, k * n, D) of rows (R, key heads, n, D); rows that have left are zeros."""
        count = len(self._prompt_keys[0])
        if len(rows) < count * self._k:
            rows = rows.new_zeros(count * self._k, *rows.shape[1:]).index_copy_(0, self._slots, rows)
        _, heads, several, size = rows.shape
        return rows.view(count, self._k, heads, several, size).transpose(1, 2).reshape(count, heads, -1, size)

    def _gather(self, groups: Tensor, several: int) -> Tensor:
        """Undo `_spread`."""
        count, heads, _, size = groups.shape
        rows = groups.view(count, heads, self._k, several, size).transpose(1, 2).reshape(-1, heads, several, size)
        return rows if len(self._slots) == len(rows) else rows.index_select(0, self._slots)

    def _append(self, buffers: list[Tensor], layer: int, new: Tensor) -> Tensor:
        """Write a column (R, key heads, D) and return all columns so far."""
        if layer == len(buffers):
            buffers.append(new.new_empty(*new.shape[:2], self._room, new.shape[2]))
        buffer = buffers[layer]
        if buffer.shape[2] == self._column:
            buffer = buffers[layer] = torch.cat(
                [buffer, buffer.new_empty(*buffer.shape[:2], _GROWTH, buffer.shape[3])], dim=2
            )
        buffer[:, :, self._column] = new
        return buffer[:, :, : self._column + 1]


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
