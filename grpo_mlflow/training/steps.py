"""The records of one optimizer step, and the weights that are fixed before it is split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from grpo_mlflow.algorithm import losses
from grpo_mlflow.algorithm.names import Aggregation
from grpo_mlflow.training.batching import Limits, Row, micro_batches


@dataclass(frozen=True, slots=True)
class Frozen:
    """Log-probabilities that an iteration does not change, by row; None where they are not needed."""

    old: Mapping[int, Sequence[float]] | None  # None: those of the policy itself, with one step per iteration
    reference: Mapping[int, Sequence[float]] | None


@dataclass(frozen=True, slots=True)
class Plan:
    """One process's share of an optimizer step."""

    batches: Sequence[Sequence[int]]  # rows of each micro-batch
    counted: int  # the first of them; the others have weight 0 and keep pace with other processes
    weights: Mapping[int, float]  # of each token of a row


@dataclass(frozen=True, slots=True)
class Applied:
    """An optimizer step that was taken; the norm is that before clipping."""

    grad_norm: float
    lr: float


def row_weights(
    rows: Sequence[Row], indices: Sequence[int], kind: Aggregation, batch_size: int, max_completion_length: int
) -> dict[int, float]:
    """Return the token weight of each row of one optimizer step, flat ones counted."""
    lengths = {i: sum(rows[i].mask) for i in indices}
    batches = micro_batches(rows, indices, Limits(batch_size))
    weights: dict[int, float] = {}
    for chosen in batches if kind == "bnpo" else [list(indices)]:
        own = torch.tensor([lengths[i] for i in chosen])
        values = losses.aggregation_weights(
            own,
            kind,
            rollouts=len(indices),
            tokens=int(own.sum()) * len(batches) if kind == "bnpo" else int(own.sum()),
            max_completion_length=max_completion_length,
        )
        weights |= dict(zip(chosen, values.tolist(), strict=True))
    return weights
