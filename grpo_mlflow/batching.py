"""From groups to micro-batches of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from grpo_mlflow.types import Group

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Row:
    """One rollout as the update needs it."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    behaviour_logprobs: tuple[float, ...]
    advantage: float
    flat: bool

    @property
    def width(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True, slots=True)
class Batch:
    """B rows padded on the right: `input_ids` (B, L); `mask` and `behaviour` (B, T); the others (B,)."""

    input_ids: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    mask: Tensor
    behaviour: Tensor
    advantages: Tensor


def rows_of(groups: Sequence[Group]) -> list[Row]:
    """Return all rollouts, group after group."""
    return [
        Row(
            prompt_ids=rollout.prompt.token_ids,
            completion_ids=rollout.completion.token_ids,
            behaviour_logprobs=rollout.completion.behaviour_logprobs,
            advantage=advantage,
            flat=group.is_flat,
        )
        for group in groups
        for rollout, advantage in zip(group.rollouts, group.advantages, strict=True)
    ]


def micro_batches(rows: Sequence[Row], indices: Sequence[int], size: int) -> list[list[int]]:
    """Split indices into micro-batches of rows of similar width, so that little is padded."""
    ordered = sorted(indices, key=lambda i: rows[i].width)
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def collate(rows: Sequence[Row], pad_id: int, device: torch.device) -> Batch:
    """Pad rows into tensors."""
    width = max(row.width for row in rows)
    ids = [[*row.prompt_ids, *row.completion_ids, *[pad_id] * (width - row.width)] for row in rows]
    lengths = torch.tensor([len(row.completion_ids) for row in rows])
    most = int(lengths.max())
    return Batch(
        input_ids=torch.tensor(ids).to(device),
        prompt_lengths=torch.tensor([len(row.prompt_ids) for row in rows]).to(device),
        lengths=lengths.to(device),
        mask=(torch.arange(most)[None, :] < lengths[:, None]).float().to(device),
        behaviour=pad([row.behaviour_logprobs for row in rows], most).to(device),
        advantages=torch.tensor([row.advantage for row in rows], dtype=torch.float32).to(device),
    )


def pad(rows: Sequence[Sequence[float]], width: int) -> Tensor:
    """Return rows as one float32 tensor (B, width), zeros on the right."""
    return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows], dtype=torch.float32)


def interleave(shares: Sequence[Sequence[Item]]) -> list[Item]:
    """Return the items in their first order, after process r of n took every n-th one starting at r."""
    total = sum(map(len, shares))
    return [shares[i % len(shares)][i // len(shares)] for i in range(total)]
