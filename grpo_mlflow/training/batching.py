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
    trained: tuple[bool, ...] | None = None

    @property
    def width(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def mask(self) -> tuple[bool, ...]:
        """True on the tokens of the completion that are trained."""
        return (True,) * len(self.completion_ids) if self.trained is None else self.trained

    @property
    def teaches(self) -> bool:
        """False if the row's gradient is zero whatever the policy says."""
        return not self.flat and any(self.mask)


@dataclass(frozen=True, slots=True)
class Batch:
    """What the loss needs of B rows: `behaviour` (B, T), 0 where `mask` is; `advantages` (B,).

    `mask` (B, T) is 1 on trained tokens.
    """

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
            trained=rollout.completion.trained,
        )
        for group in groups
        for rollout, advantage in zip(group.rollouts, group.advantages, strict=True)
    ]


def micro_batches(rows: Sequence[Row], indices: Sequence[int], size: int) -> list[list[int]]:
    """Split indices into micro-batches of rows of similar width, so that little is padded."""
    ordered = sorted(indices, key=lambda i: rows[i].width)
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def alike_batches(rows: Sequence[Row], indices: Sequence[int], size: int) -> list[list[int]]:
    """Split indices into micro-batches of at most `size` rows of the same width."""
    widths: dict[int, list[int]] = {}
    for i in indices:
        widths.setdefault(rows[i].width, []).append(i)
    return [widths[w][start : start + size] for w in sorted(widths) for start in range(0, len(widths[w]), size)]


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
    most = max(len(row.completion_ids) for row in rows)
    mask = pad([row.mask for row in rows], most)
    # on other tokens no log-prob is asked for, and 0 times one that is no number would spoil the gradient
    behaviour = pad([row.behaviour_logprobs for row in rows], most).masked_fill(mask == 0, 0.0)
    return Batch(
        mask=mask.to(device),
        behaviour=behaviour.to(device),
        advantages=torch.tensor([row.advantage for row in rows], dtype=torch.float32).to(device),
    )


def pad(rows: Sequence[Sequence[float]], width: int) -> Tensor:
    """Return rows as one float32 tensor (B, width), zeros on the right."""
    return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows], dtype=torch.float32)
