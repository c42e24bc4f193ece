"""Keys and values of rows that grow token by token, and attention of each row's newest token to them.

A batch begins with one row for each of G prompts; `keep` repeats rows, up to k times. `Copies` gives each row its own
copy of its prompt: all that a row looks at stands side by side, and attention is two products for each row and head.
`Summed` has copies too, but multiplies number by number and adds up: so many products of tiny matrices take longer to
start than to compute. `Shared` keeps a prompt once for its rows, with more operations for each token, but without
reading or holding it k times: better where prompts are long or rows are many.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from grpo_mlflow.forward import tuning
from grpo_mlflow.forward.attention import Packed


class RowCache(Packed, Protocol):
    """Attends for the newest token of each row, and keeps its key and value."""

    def advance(self) -> None:
        """Each layer has attended for the newest tokens."""
        ...

    def keep(self, index: Tensor) -> None:
        """Go on with the rows of `index`, those of a prompt side by side; a row may be in it several times."""
        ...


def start(keys: Sequence[Tensor], values: Sequence[Tensor], filled: Tensor, k: int, most: int, heads: int) -> RowCache:
    """Return the cache of G rows, later k for each at most, for `most` tokens of a model with so many query heads.

    Keys and values of the prompts are (G, key heads, P, D) for each layer; `filled` (G, P) is True on their tokens.
    """
    _, key_heads, columns, size = keys[0].shape
    if filled.numel() * k > tuning.COPIED_TOKENS:
        kind: type[Shared | Summed | Copies] = Shared
    elif _sums_pay(keys[0], values[0]) and heads == key_heads and (columns + most) * size <= tuning.SUMMED_NUMBERS:
        kind = Summed
    else:
        kind = Copies
    return kind(keys, values, filled, most)


def _sums_pay(*parts: Tensor) -> bool:
    # products of shorter numbers would be rounded
    return all(part.device.type == "cpu" and part.dtype == torch.float32 for part in parts)


def _mask(filled: Tensor) -> Tensor | None:
    """Return what is added to scores (G, key heads, queries, P): (G, 1, 1, P), None where no prompt is padded."""
    if bool(filled.all()):
        return None
    return torch.zeros(filled.shape, device=filled.device).masked_fill_(~filled, -torch.inf)[:, None, None]


class _Columns:
    """Per layer a buffer that begins with the columns given and grows along the dimension `columns`."""

    def __init__(self, first: Iterable[Tensor], room: int, columns: int, rows: int) -> None:
        self._room, self._columns, self._rows = min(room, tuning.CACHE_GROWTH), columns, rows
        self._buffers = []
        for part in first:
            self._count = part.shape[columns]
            self._buffers.append(self._with_room(part))

    def _with_room(self, filled: Tensor) -> Tensor:
        shape = list(filled.shape)
        shape[self._columns] += self._room
        buffer = filled.new_empty(shape)
        buffer.narrow(self._columns, 0, self._count).copy_(filled)
        return buffer

    def append(self, layer: int, new: Tensor) -> Tensor:
        """Write a column and return all columns so far."""
        buffer = self._buffers[layer]
        if buffer.shape[self._columns] == self._count:
            buffer = self._buffers[layer] = self._with_room(buffer)
        buffer.select(self._columns, self._count).copy_(new)
        return buffer.narrow(self._columns, 0, self._count + 1)

    def advance(self) -> None:
        self._count += 1

    def keep(self, index: Tensor) -> None:
        for layer, buffer in enumerate(self._buffers):  # one after the other, for together they may be much memory
            self._buffers[layer] = buffer.index_select(self._rows, index)


class _Rows(RowCache):
    """Keys and values of rows, which begin with those given, for `most` tokens more than `filled` (G, P) holds."""

    def __init__(
        self,
        keys: Iterable[Tensor],
        values: Iterable[Tensor],
        filled: Tensor,
        most: int,
        columns: int = 2,
        rows: int = 0,
    ) -> None:
        self.longest = filled.shape[1] + most
        self._keys, self._values = (_Columns(parts, most, columns, rows) for parts in (keys, values))

    def _append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return self._keys.append(layer, key), self._values.append(layer, value)

    def advance(self) -> None:
        """See `RowCache.advance`."""
        self._keys.advance()
        self._values.advance()

    def keep(self, index: Tensor) -> None:
        """See `RowCache.keep`."""
        self._keys.keep(index)
        self._values.keep(index)


class Copies(_Rows):
    """See the module."""

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], filled: Tensor, most: int) -> None:
        super().__init__(keys, values, filled, most)
        self._mask = _mask(filled)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """See `Packed.attend`."""
        rows, heads, size = query.shape
        scale = size**-0.5 if scaling is None else scaling
        keys, values = (part.flatten(0, 1) for part in self._append(layer, key, value))
        # the heads that share a key head stand in the place of several queries
        grouped = query.reshape(len(keys), -1, size)
        scores = torch.baddbmm(grouped.new_empty(()), grouped, keys.transpose(1, 2), beta=0, alpha=scale)
        if self._mask is not None:
            scores.view(rows, key.shape[1], *scores.shape[1:])[..., : self._mask.shape[-1]] += self._mask
        shares = scores.softmax(dim=-1, dtype=torch.float32).to(values.dtype)
        return torch.bmm(shares, values).view(rows, heads, size)

    def keep(self, index: Tensor) -> None:
        """See `RowCache.keep`."""
        super().keep(index)
        self._mask = None if self._mask is None else self._mask[index]


class Summed(_Rows):
    """See the module. Buffers are (columns, heads, D, R), for `llama_step` has the numbers of all rows side by side."""

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], filled: Tensor, most: int) -> None:
        by_column = [(part.permute(2, 1, 3, 0) for part in parts) for parts in (keys, values)]
        super().__init__(by_column[0], by_column[1], filled, most, columns=0, rows=3)
        mask = _mask(filled)
        self._mask = None if mask is None else mask[:, 0].permute(2, 1, 0)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """See `Packed.attend`."""
        query, key, value = (part.permute(1, 2, 0) for part in (query, key, value))
        scale = query.shape[1] ** -0.5 if scaling is None else scaling
        keys, values = self._append(layer, key, value)
        scores = (keys * query).sum(dim=2).mul_(scale)  # (columns, heads, R)
        if self._mask is not None:
            scores[: len(self._mask)] += self._mask
        shares = scores.softmax(dim=0)
        return (values * shares[:, :, None]).sum(dim=0).permute(2, 0, 1)

    def keep(self, index: Tensor) -> None:
        """See `RowCache.keep`."""
        super().keep(index)
        self._mask = None if self._mask is None else self._mask[:, :, index]


class Shared(_Rows):
    """See the module; products with a prompt's keys and values are those of all its rows at once.

    `slots` (R,) is the number of a row's prompt times `most_rows`, those of the prompt that has most, and the row's
    number among those of its prompt: slots without a row are zeros in these products.
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], filled: Tensor, most: int) -> None:
        self._prompt_keys, self._prompt_values = list(keys), list(values)
        super().__init__((part[:, :, :0] for part in keys), (part[:, :, :0] for part in values), filled, most)
        self._mask = _mask(filled)
        self._most_rows, self._slots = 1, torch.arange(len(filled), device=filled.device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """See `Packed.attend`."""
        rows, heads, size = query.shape
        scale = size**-0.5 if scaling is None else scaling
        keys, values = self._append(layer, key, value)
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
        """Return (G, key heads, most rows * n, D) of rows (R, key heads, n, D)."""
        count = len(self._prompt_keys[0])
        if len(rows) < count * self._most_rows:
            rows = rows.new_zeros(count * self._most_rows, *rows.shape[1:]).index_copy_(0, self._slots, rows)
        _, heads, several, size = rows.shape
        return rows.view(count, self._most_rows, heads, several, size).transpose(1, 2).reshape(count, heads, -1, size)

    def _gather(self, groups: Tensor, several: int) -> Tensor:
        """Undo `_spread`."""
        count, heads, _, size = groups.shape
        rows = groups.view(count, heads, -1, several, size).transpose(1, 2).reshape(-1, heads, several, size)
        return rows if len(self._slots) == len(rows) else rows.index_select(0, self._slots)

    def keep(self, index: Tensor) -> None:
        """See `RowCache.keep`."""
        super().keep(index)
        prompts, owners, counts = torch.unique(
            self._slots[index] // self._most_rows, return_inverse=True, return_counts=True
        )
        numbers = torch.arange(len(index), device=index.device) - (counts.cumsum(0) - counts)[owners]
        self._most_rows = int(counts.max())
        self._slots = owners * self._most_rows + numbers
        if len(prompts) < len(self._prompt_keys[0]):
            for buffers in (self._prompt_keys, self._prompt_values):
                buffers[:] = [buffer.index_select(0, prompts) for buffer in buffers]
            self._mask = self._mask[prompts] if self._mask is not None else None
