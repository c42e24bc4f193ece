"""Groups without a learning signal give their places to groups of further problems.

This is dynamic sampling (Yu et al. 2025, DAPO, arXiv 2503.14476, section 3.2). In each of `data.resample_rounds` rounds
as many problems are sampled as there are groups left whose rewards are all equal; those that are flat too are dropped.
After the last round the flat ones that are left stay: they carry no signal, and count in every denominator as they
always do.
"""

from __future__ import annotations

from pathlib import Path

from grpo_mlflow.training.sources.base import Collected, GroupSource
from grpo_mlflow.training.sources.sampler import Sampler
from grpo_mlflow.types import Group


class Resampled:
    """Takes the groups of another source, and samples others in place of the flat ones.

    Args:
        source: samples with the same `sampler`, to whose generator it has given the weights of the iteration.
        rounds: how often the groups that are still flat are replaced, at most.
    """

    def __init__(self, source: GroupSource, sampler: Sampler, rounds: int) -> None:
        self._source, self._sampler, self._rounds = source, sampler, rounds

    def groups(self, version: int) -> Collected:
        first = self._source.groups(version).groups
        seeds = self._sampler.further_seeds(version)
        chosen, further = list(first), list[Group]()
        for number in range(self._rounds):
            places = [place for place, group in enumerate(chosen) if group.is_flat]
            drawn, seeds = seeds[: len(places)], seeds[len(places) :]
            if not drawn:
                break
            groups = self._sampler.sample(drawn, ("train", version, "resample", number))
            further += groups
            for place, group in zip(places, [group for group in groups if not group.is_flat], strict=False):
                chosen[place] = group
        # anew: the advantages of `batch` scaling depend on all groups of the iteration
        chosen = self._sampler.form([group.problem for group in chosen], [group.rollouts for group in chosen])
        return Collected(chosen, first, further)

    def begin(self, version: int) -> None:
        self._source.begin(version)

    def settle(self) -> None:
        self._source.settle()

    def stop(self) -> None:
        self._source.stop()

    def save(self, path: Path, version: int) -> None:
        self._source.save(path, version)

    def metrics(self) -> dict[str, float]:
        return self._source.metrics()
