"""Groups that each iteration samples with its own weights."""

from __future__ import annotations

from grpo_mlflow.training.sources.base import Collected, HoldsNothing
from grpo_mlflow.training.sources.sampler import Sampler, iteration_key


class Sampled(HoldsNothing):
    """Samples an iteration when it is asked for."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def groups(self, version: int) -> Collected:
        self._sampler.generator.sync(version)
        groups = self._sampler.sample(self._sampler.seeds(version), iteration_key(version))
        return Collected(groups, groups)

    def begin(self, version: int) -> None:
        """Nothing is sampled until the next iteration."""
        self._sampler.rest()

    def metrics(self) -> dict[str, float]:
        return self._sampler.generator.metrics()
