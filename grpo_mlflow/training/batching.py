"""From groups to micro-batches of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_mlflow.types import Group


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
    """What the loss needs of B rows: `mask` and `behaviour` (B, T), zeros on the right; `advantages` (B,)."""

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


def prompt_batches(rows: Sequence[Row], indices: Sequence[int], size: int) -> list[list[int]]:
    """Split indices into micro-batches of at most `size` rows that keep rows of one prompt together.

    Prompts of similar length come together; more than `size` rows of one prompt are split.
    """
    families: dict[tuple[int, ...], list[int]] = {}
    for i in indices:
        families.setdefault(rows[i].prompt_ids, []).append(i)
    batches: list[list[int]] = []
    for prompt_ids in sorted(families, key=len):
        family = sorted(families[prompt_ids], key=lambda i: rows[i].width)
        for start in range(0, len(family), size):
            part = family[start : start + size]
            if batches and len(batches[-1]) + len(part) <= size:
                batches[-1] += part
            else:
                batches.append(part)
    return batches


def collate(rows: Sequence[Row], device: torch.device) -> Batch:
    """Pad what the loss needs of rows into tensors."""
    lengths = torch.tensor([len(row.completion_ids) for row in rows])
    most = int(lengths.max())
    return Batch(
        mask=(torch.arange(most)[None, :] < lengths[:, None]).float().to(device),
        behaviour=pad([row.behaviour_logprobs for row in rows], most).to(device),
        advantages=torch.tensor([row.advantage for row in rows], dtype=torch.float32).to(device),
    )


def pad(rows: Sequence[Sequence[float]], width: int) -> Tensor:
    """Return rows as one float32 tensor (B, width), zeros on the right."""
    return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows], dtype=torch.float32)
