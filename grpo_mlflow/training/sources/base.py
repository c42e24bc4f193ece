"""The interface between the training loop and whatever gives it groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from grpo_mlflow.algorithm.statistics import mean
from grpo_mlflow.training import rollout_metrics
from grpo_mlflow.types import Group


@dataclass(frozen=True, slots=True)
class Collected:
    """An iteration's groups: those to train on, and what they were chosen from.

    `first` are the groups of the iteration's own problems, flat ones included; `further` those of the problems that
    were sampled in place of flat ones, or None where that is off.
    """

    groups: Sequence[Group]
    first: Sequence[Group]
    further: Sequence[Group] | None = None

    @property
    def sampled(self) -> list[Group]:
        """All that was sampled, trained on or not."""
        return [*self.first, *(self.further or ())]

    def metrics(self) -> dict[str, float]:
        """Return `rollout_metrics.metrics` of `first`, since a choice by reward would flatter them, and of the choice.

        The advantages are those of the groups to train on.
        """
        found = rollout_metrics.metrics(self.first)
        if self.further is not None:
            found |= rollout_metrics.advantage_metrics(self.groups)
            found["resampled_problems"] = float(len(self.further))
            found["resampled_flat_frac"] = mean([group.is_flat for group in self.further]) if self.further else 0.0
            found["flat_group_frac_trained"] = mean([group.is_flat for group in self.groups])
        return found


class GroupSource(Protocol):
    """Gives the groups of each iteration, in order. Processes share the work, and each gets all groups.

    In an iteration: `groups(version)`, `begin(version + 1)`, then the update of the weights.
    """

    def groups(self, version: int) -> Collected:
        """Return the groups of iteration `version`; the policy's weights are those of this version.

        Raises:
            ServerFailed: they cannot be sampled now. What was sampled ahead is still there for `save`.
        """
        ...

    def begin(self, version: int) -> None:
        """Sample iteration `version` in the background from now on; no work for a source that does not sample ahead.

        The groups of the iteration before are in use: those of earlier ones may be forgotten.
        """
        ...

    def settle(self) -> None:
        """Wait for the groups that are being sampled in the background."""
        ...

    def stop(self) -> None:
        """End the sampling in the background without waiting; keep the groups if all are there, else drop them."""
        ...

    def save(self, path: Path, version: int) -> None:
        """Write the groups of iteration `version` if they were sampled ahead, so that a resumed run trains on the same.

        Else no file is written.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """Return what sampling met since the last call, as metrics of `perf/`."""
        ...


class HoldsNothing:
    """Base of the sources that sample nothing in the background, so they have nothing to wait for, stop or save."""

    def begin(self, version: int) -> None: ...

    def settle(self) -> None: ...

    def stop(self) -> None: ...

    def save(self, path: Path, version: int) -> None: ...
