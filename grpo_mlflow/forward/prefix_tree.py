"""Sequences that begin alike, packed into one row of tokens in which what they share stands once.

The levels of a tree: what all prompts begin with (a system prompt, worked examples), the rest of each prompt, the
completions. A sequence continues one of the level above it; it attends to what it continues, whose keys and values are
expanded over all that continue it, and to itself. Autograd adds their gradients up at the expansion, so what is shared
runs backward once too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from grpo_mlflow.forward import tuning
from grpo_mlflow.forward.attention import Packed

Ids = Sequence[int]


@dataclass(frozen=True, slots=True)
class Level:
    """Sequences, and for each the index of the one above that it continues; on top there are none."""

    sequences: Sequence[Ids]
    parents: Sequence[int] = ()


def common_prefix(prompts: Sequence[Ids]) -> int:
    """Return how many first tokens all prompts share and are computed once: 0 where that would not pay.

    Each prompt keeps its last token for itself.
    """
    if not prompts:
        return 0
    least, most = (choose(prompts, key=tuple) for choose in (min, max))  # all others lie between them
    alike = [a == b for a, b in zip(least, most, strict=False)]
    shared = min([*(i for i, same in enumerate(alike) if not same), *(len(prompt) - 1 for prompt in prompts)])
    saved, rest = shared * (len(prompts) - 1), max(map(len, prompts)) - shared
    pays = saved >= tuning.PREFIX_TOKENS_SAVED and rest <= tuning.PREFIX_LONGEST_REST * shared
    return shared if pays else 0


def prompt_levels(prompts: Sequence[Ids]) -> list[Level]:
    """Return the prompts as one level, or as two: what they begin with, and the rest."""
    shared = common_prefix(prompts)
    if not shared:
        return [Level(prompts)]
    return [Level([prompts[0][:shared]]), Level([prompt[shared:] for prompt in prompts], [0] * len(prompts))]


def in_a_row(sequences: Sequence[Ids], device: torch.device) -> Tensor:
    """Return all tokens (N,), one sequence after the other."""
    tokens = np.fromiter(chain.from_iterable(sequences), np.int64)  # `torch.tensor` takes six times as long
    return torch.from_numpy(tokens).to(device)


class Tree(Packed):
    """N tokens, level after level and sequence after sequence.

    ids, positions (N,)    the row
    longest                how many tokens the longest sequence has, with what it continues
    starts, lengths        for each level: where its sequences begin in the row, and how long they are
    filled (C, W)          for the last level: True on the tokens of its keys and values, see `attend_keeping`
    """

    def __init__(self, levels: Sequence[Level], device: torch.device) -> None:
        counts = [len(level.sequences) for level in levels]
        sequences = [sequence for level in levels for sequence in level.sequences]
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        starts = lengths.cumsum(0) - lengths
        self.starts, self.lengths = torch.split(starts, counts), torch.split(lengths, counts)
        self.ids = in_a_row(sequences, device)

        self._parents: list[Tensor | None] = []
        self._masks: list[Tensor | None] = []  # None: plainly causal
        filled = torch.zeros(counts[0], 0, dtype=torch.bool, device=device)
        before = torch.zeros(counts[0], dtype=torch.long)  # how many tokens each sequence of a level continues
        offsets = []
        for level, own in zip(levels, self.lengths, strict=True):
            inside = (torch.arange(int(own.max()))[None, :] < own[:, None]).to(device)
            if level.parents:
                parents = torch.tensor(level.parents)
                before, above = before[parents], filled[parents.to(device)]
                self._parents.append(parents.to(device))
                self._masks.append(_mask(above, inside.shape[1]))
                filled = torch.cat([above, inside], dim=1)
            else:
                self._parents.append(None)
                width = inside.shape[1]
                self._masks.append(_mask(filled, width) if _few(filled.device, width, width) else None)
                filled = inside
            offsets.append(before)
            before = before + own
        self.filled = filled
        shifts = torch.cat(offsets) - starts
        positions = torch.arange(len(self.ids)) + shifts.repeat_interleave(lengths)
        self.positions, self.longest = positions.to(device), int(positions.max()) + 1

        # for attention each level is a block (sequences, width), padded on the right
        self._blocks = [(count, int(own.max())) for count, own in zip(counts, self.lengths, strict=True)]
        widths = torch.tensor([width for count, width in self._blocks for _ in range(count)])
        begins = widths.cumsum(0) - widths
        slots = (torch.arange(len(self.ids)) + (begins - starts).repeat_interleave(lengths)).to(device)
        places = torch.zeros(int(widths.sum()), dtype=torch.long, device=device)  # a filler repeats the first token
        places[slots] = torch.arange(len(self.ids), device=device)
        filler = torch.ones(len(places), dtype=torch.bool, device=device)
        filler[slots] = False
        self._slots, self._places, self._fillers = slots, places, filler.nonzero().squeeze(1)

    def spans(self) -> list[list[slice]]:
        """Return where each sequence of the last level stands in the row, after what it continues."""
        found: list[list[slice]] = [[]]
        for starts, lengths, parents in zip(self.starts, self.lengths, self._parents, strict=True):
            above = [0] * len(starts) if parents is None else parents.tolist()
            own = [
                slice(start, start + length) for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
            ]
            found = [[*found[parent], each] for parent, each in zip(above, own, strict=True)]
        return found

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """See `Packed.attend`; tokens are those of `ids`."""
        return self.attend_keeping(query, key, value, scaling)[0]

    def attend_keeping(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the attention, and all that the sequences C of the last level attend to: keys and values, both
        (C, key heads, W, D), those above first."""
        sizes = [count * width for count, width in self._blocks]
        parts = zip(*(torch.split(self._unpack(part), sizes) for part in (query, key, value)), strict=True)
        found, keys, values = [], key, value
        for (count, width), parents, mask, rows in zip(self._blocks, self._parents, self._masks, parts, strict=True):
            if not width:  # completions of a single token, which is looked at by none
                continue
            q, k, v = (part.view(count, width, *part.shape[1:]).transpose(1, 2) for part in rows)
            if parents is not None:
                k = torch.cat([_expand(keys, parents), k], dim=2)
                v = torch.cat([_expand(values, parents), v], dim=2)
            keys, values = k, v
            found.append(attention(q, k, v, mask, scaling).transpose(1, 2).flatten(0, 1))
        return self._pack(torch.cat(found)), keys, values

    def _unpack(self, rows: Tensor) -> Tensor:
        """Return tokens (N, ...) in their padded places."""
        if not len(self._fillers):
            return rows
        return _look_up(rows, self._places, self._slots, None)

    def _pack(self, rows: Tensor) -> Tensor:
        """Return the tokens (N, ...) of padded places."""
        if not len(self._fillers):
            return rows
        return _look_up(rows, self._slots, self._places, self._fillers)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Return (C, heads, W, D) from `query` of that shape, `key` and `value` (C, key heads, A + W, D).

    Without a mask it is causal, and A is 0.
    """
    (count, heads, width, size), key_heads = query.shape, key.shape[1]
    plain = query.dtype == value.dtype == torch.float32  # else the scores would be rounded
    if mask is not None and plain and _few(query.device, width, key.shape[2]):
        # the heads that share a key head stand in the place of further tokens
        rows, keys, values = (part.reshape(count * key_heads, -1, size) for part in (query, key, value))
        scale = size**-0.5 if scaling is None else scaling
        scores = torch.baddbmm(rows.new_empty(()), rows, keys.transpose(1, 2), beta=0, alpha=scale)
        shares = (scores.view(count, heads, width, -1) + mask).softmax(dim=-1)
        return torch.bmm(shares.view(scores.shape), values).view(query.shape)
    # the lean kernels want the numbers of a token side by side, else all scores are held
    query, key, value = (part if part.stride(-1) == 1 else part.contiguous() for part in (query, key, value))
    bias = None if mask is None else mask.to(query.dtype)
    if heads != key_heads and bias is not None and key.is_cuda:  # there they take a mask or grouped heads, not both
        key, value = (part.repeat_interleave(heads // key_heads, dim=1) for part in (key, value))
    return scaled_dot_product_attention(
        query, key, value, attn_mask=bias, is_causal=bias is None, scale=scaling, enable_gqa=heads != key.shape[1]
    )


def _few(device: torch.device, width: int, columns: int) -> bool:
    return device.type == "cpu" and width * columns <= tuning.PLAIN_ATTENTION_SCORES


def _mask(above: Tensor, width: int) -> Tensor:
    """Return what sequences of `width` tokens may look at, as an additive mask (C, 1, width, A + width), or one for all
    of them; `above` (C, A) is True on what they continue."""
    if bool(above.all()):
        above = above[:1]
    count, before = above.shape
    own = torch.ones(width, width, dtype=torch.bool, device=above.device).tril()
    seen = torch.cat([above[:, None].expand(count, width, before), own.expand(count, width, width)], dim=2)
    return torch.zeros(seen.shape, device=above.device).masked_fill_(~seen, -torch.inf)[:, None]


def _look_up(rows: Tensor, index: Tensor, inverse: Tensor, unused: Tensor | None) -> Tensor:
    """Return rows by index. Each is used once, so its gradient is looked up by `inverse`; places in `unused` have none,
    nor do fillers, which nothing looks at.

    The gradient of plain indexing adds up row by row, which costs more than attention itself.
    """
    apply: Any = _LookUp.apply
    found: Tensor = apply(rows, index, inverse, unused)
    return found


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor, unused: Tensor | None) -> Tensor:
        ctx.save_for_backward(inverse, unused)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        inverse, unused = ctx.saved_tensors
        gradient = grads[0].index_select(0, inverse)
        if unused is not None:
            gradient.index_fill_(0, unused, 0.0)
        return gradient, None, None, None


def _expand(rows: Tensor, parents: Tensor) -> Tensor:
    """Return (C, ...) from rows: each sequence's own copy of what it continues."""
    apply: Any = _Expand.apply
    found: Tensor = apply(rows, parents)
    return found


class _Expand(torch.autograd.Function):
    """Rows by index, with the gradient as a matrix product, which adds up far faster than `index_add`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.count = len(rows)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (index,), (gradient,) = ctx.saved_tensors, grads
        belongs = torch.zeros(ctx.count, len(index), dtype=gradient.dtype, device=gradient.device)
        belongs[index, torch.arange(len(index), device=index.device)] = 1.0
        return (belongs @ gradient.flatten(1)).view(ctx.count, *gradient.shape[1:]), None
