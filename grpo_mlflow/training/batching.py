"""From groups to micro-batches of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_mlflow.types import Completion, Group


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


def rows_of(groups: Sequence[Group], mask_truncated: bool = False) -> list[Row]:
    """Return all rollouts, group after group; with `mask_truncated` those that were cut off have no trained token.

    This is the overlong filtering of DAPO (Yu et al. 2025, arXiv 2503.14476, section 3.4), as TRL does it: the reward
    of such a completion is in the mean of its group, and it counts among the rollouts, but not among the tokens.
    """
    return [
        Row(
            prompt_ids=rollout.prompt.token_ids,
            completion_ids=rollout.completion.token_ids,
            behaviour_logprobs=rollout.completion.behaviour_logprobs,
            advantage=advantage,
            flat=group.is_flat,
            trained=_trained(rollout.completion, mask_truncated),
        )
        for group in groups
        for rollout, advantage in zip(group.rollouts, group.advantages, strict=True)
    ]


def _trained(completion: Completion, mask_truncated: bool) -> tuple[bool, ...] | None:
    if mask_truncated and completion.is_truncated:
        return (False,) * len(completion.token_ids)
    return completion.trained


@dataclass(frozen=True, slots=True)
class Limits:
    """What a micro-batch may hold: so many rows, and tokens (None: any number). A row of more tokens stands alone."""

    rows: int
    tokens: int | None = None

    def allow(self, rows: int, tokens: int) -> bool:
        return rows <= 1 or (rows <= self.rows and (self.tokens is None or tokens <= self.tokens))


def micro_batches(rows: Sequence[Row], indices: Sequence[int], limits: Limits) -> list[list[int]]:
    """Split indices into micro-batches of rows of similar width, so that little is padded; padding counts as tokens."""
    batches: list[list[int]] = []
    for i in sorted(indices, key=lambda i: rows[i].width):  # so the last one is the widest
        if batches and limits.allow(len(batches[-1]) + 1, (len(batches[-1]) + 1) * rows[i].width):
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def alike_batches(rows: Sequence[Row], indices: Sequence[int], limits: Limits) -> list[list[int]]:
    """Split indices into micro-batches of rows of the same width."""
    widths: dict[int, list[int]] = {}
    for i in indices:
        widths.setdefault(rows[i].width, []).append(i)
    return [batch for width in sorted(widths) for batch in micro_batches(rows, widths[width], limits)]


def prompt_batches(rows: Sequence[Row], indices: Sequence[int], limits: Limits) -> list[list[int]]:
    """Split indices into micro-batches that keep rows of one prompt together, whose tokens count once.

    Prompts of similar length come together; rows of one prompt that are too many are split.
    """
    families: dict[tuple[int, ...], list[int]] = {}
    for i in indices:
        families.setdefault(rows[i].prompt_ids, []).append(i)
    batches: list[list[int]] = []
    held = 0  # tokens in the last batch
    for prompt_ids in sorted(families, key=len):
        for part, tokens in _parts(rows, families[prompt_ids], limits):
            if batches and limits.allow(len(batches[-1]) + len(part), held + tokens):
                batches[-1] += part
                held += tokens
            else:
                batches.append(part)
                held = tokens
    return batches


def _parts(rows: Sequence[Row], family: Sequence[int], limits: Limits) -> list[tuple[list[int], int]]:
    """Split the rows of one prompt, and return how many tokens each part has."""
    parts: list[tuple[list[int], int]] = []
    for i in sorted(family, key=lambda i: rows[i].width):
        own = len(rows[i].completion_ids)
        if parts and limits.allow(len(parts[-1][0]) + 1, parts[-1][1] + own):
            part, tokens = parts[-1]
            parts[-1] = ([*part, i], tokens + own)
        else:
            parts.append(([i], rows[i].width))
    return parts


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
