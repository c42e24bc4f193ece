"""From a config to the source of a run's groups."""

from __future__ import annotations

from collections.abc import Callable

from grpo_mlflow.config import Config
from grpo_mlflow.generation import Generator
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.runtime.processes import Processes
from grpo_mlflow.tasks import Task
from grpo_mlflow.training.sources.ahead import Ahead, SampledAhead
from grpo_mlflow.training.sources.base import GroupSource
from grpo_mlflow.training.sources.recorded import Recorded
from grpo_mlflow.training.sources.resampled import Resampled
from grpo_mlflow.training.sources.sampled import Sampled
from grpo_mlflow.training.sources.sampler import Sampler
from grpo_mlflow.types import Group


def group_source(
    config: Config,
    task: Task,
    policy: Policy,
    make_generator: Callable[[], Generator],
    processes: Processes,
    *,
    recording: Callable[[int], list[Group]] | None = None,
    ahead: Ahead | None = None,
) -> GroupSource:
    """Return what gives the groups of a run.

    Args:
        make_generator: called only if groups are sampled, so that a recording needs no server.
        recording: the groups of an earlier run (`open_recording`), which replace sampled ones.
        ahead: the groups that were sampled ahead before a resume.
    """
    if recording is not None:
        return Recorded(recording, processes)
    sampler = Sampler(config, task, policy, make_generator(), processes)
    source: GroupSource = Sampled(sampler)
    if config.generation.async_rollouts:
        source = SampledAhead(sampler, config.train.iterations, ahead)
    rounds = config.data.resample_rounds
    return Resampled(source, sampler, rounds) if rounds else source
