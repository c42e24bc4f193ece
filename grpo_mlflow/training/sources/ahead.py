"""Groups that are sampled while the iteration before is trained.

With `generation.async_rollouts` = 1, iteration i + 1 is sampled by the version that iteration i started from, while
iteration i is trained: one step off-policy (as in Noukhovitch et al. 2024, arXiv 2410.18252). Each completion carries
the version that sampled it, and the sampler correction weighs it by the policy that is trained.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from grpo_mlflow.training import rollout_files
from grpo_mlflow.training.checkpoint import Checkpoint, reading
from grpo_mlflow.training.sources.base import Collected
from grpo_mlflow.training.sources.sampler import InFlight, Sampler, iteration_key
from grpo_mlflow.types import Group

AHEAD = "ahead.jsonl"  # in a checkpoint: the groups of its iteration, where they were sampled ahead


@dataclass(frozen=True, slots=True)
class Ahead:
    """The groups of an iteration that were sampled before it began."""

    version: int
    groups: list[Group]


def read_ahead(checkpoint: Checkpoint) -> Ahead | None:
    """Return what a checkpoint's run had sampled ahead, or None."""
    path = checkpoint.path / "trainer" / AHEAD
    if not path.is_file():
        return None
    with reading(path):
        return Ahead(checkpoint.iteration, rollout_files.read(path))


class SampledAhead:
    """Samples in the background, from `begin` on, what `groups` is asked for next.

    The first iteration, which nothing could be done ahead for, is sampled when it is asked for.

    Args:
        until: iterations from this one on are not begun.
        ahead: the groups that were sampled ahead before a resume.
    """

    def __init__(self, sampler: Sampler, until: int, ahead: Ahead | None) -> None:
        self._sampler, self._until = sampler, until
        self._in_flight: tuple[int, InFlight] | None = None  # of which iteration
        self._ahead = {ahead.version: ahead.groups} if ahead else {}

    def groups(self, version: int) -> Collected:
        self.settle()  # the server must not get other weights while it samples
        self._sampler.generator.sync(version)
        groups = self._ahead.get(version)
        if groups is None:
            groups = self._sampler.sample(self._sampler.seeds(version), iteration_key(version))
        return Collected(groups, groups)

    def begin(self, version: int) -> None:
        # those in use stay: until their update has begun, the run may fail, and a checkpoint of before needs them
        self._ahead = {number: groups for number, groups in self._ahead.items() if number == version - 1}
        if version >= self._until:
            return
        self._in_flight = version, self._sampler.begin(self._sampler.seeds(version), iteration_key(version))

    def settle(self) -> None:
        if self._in_flight is not None:
            version, in_flight = self._in_flight
            self._ahead[version] = self._sampler.judge(in_flight, version, self._sampled)

    def _sampled(self) -> None:
        self._in_flight = None  # an end of the run that comes of judging, or within it, must not judge again

    def stop(self) -> None:
        # Several processes judge together, and need not all stop here.
        if self._in_flight is not None and self._sampler.is_alone and self._in_flight[1].begun.succeeded():
            with suppress(Exception):  # what cannot be judged may be what the run ends with: it is sampled again
                self.settle()
        if self._in_flight is not None:
            self._in_flight[1].begun.cancel()
            self._in_flight = None

    def save(self, path: Path, version: int) -> None:
        if version in self._ahead:
            rollout_files.write(path, self._ahead[version])

    def metrics(self) -> dict[str, float]:
        return self._sampler.generator.metrics()
