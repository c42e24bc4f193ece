"""Groups that an earlier run has kept, to train on again (`data.source=runs:/RUN_ID`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from grpo_mlflow import tracking
from grpo_mlflow.config import Config, yaml12
from grpo_mlflow.config.command import run_id_of
from grpo_mlflow.errors import ConfigError, StoreAway, UserError, one_line
from grpo_mlflow.runtime.processes import Processes
from grpo_mlflow.tasks.posed import weighed
from grpo_mlflow.training import rollout_files, rollouts
from grpo_mlflow.training.checkpoint import name_of
from grpo_mlflow.training.sources.base import Collected, HoldsNothing
from grpo_mlflow.types import Group


@dataclass(frozen=True, slots=True)
class Recording:
    """Gives the groups of an iteration by its number, of which there are `iterations`.

    `backend` (as `generation.backend`) is what sampled them.
    """

    groups: Callable[[int], list[Group]]
    backend: str
    iterations: int

    def __call__(self, iteration: int) -> list[Group]:
        return self.groups(iteration)


class Recorded(HoldsNothing):
    """Gives the groups of a recording."""

    def __init__(self, recording: Callable[[int], list[Group]], processes: Processes) -> None:
        self._recording, self._processes = recording, processes

    def groups(self, version: int) -> Collected:
        groups = self._processes.agreed(lambda: self._recording(version))
        return Collected(groups, groups)

    def metrics(self) -> dict[str, float]:
        return {}


def open_recording(config: Config) -> Recording | None:
    """Return the recording of the run in `data.source`, or None for `live`.

    Advantages are computed anew; the sampler correction accounts for the distance to the policy that sampled.

    Raises:
        UserError: there is no such run, it has kept too few iterations, or (when read) groups of another size.
    """
    source, wanted = config.data.source, config.train.iterations
    run_id = run_id_of(source)
    if run_id is None:
        return None
    client = tracking.connect(config.tracking.uri)
    try:
        kept = len(tracking.files(client, run_id, "rollouts"))
    except StoreAway:
        raise
    except UserError as error:
        raise ConfigError(f"data.source = {source!r}: {error}") from error
    if kept < wanted:
        allowed = f"train.iterations of {kept} or less" if kept else "a training run with tracking.rollouts=true"
        raise ConfigError(
            f"data.source = {source!r}: that run has kept {kept} iterations, but train.iterations = {wanted}; "
            f"allowed: {allowed}"
        )

    def groups_of(iteration: int) -> list[Group]:
        path = tracking.artifact(client, run_id, f"rollouts/{name_of(iteration)}.jsonl")
        try:
            groups = rollout_files.read(path)
        except (ValueError, LookupError, TypeError) as error:
            raise ConfigError(
                f"data.source = {source!r}: iteration {iteration} is no whole recording: {path}: {one_line(error)}"
            ) from error
        found = sum(len(group.rollouts) for group in groups)
        if found != config.rollouts_per_iteration:
            raise ConfigError(
                f"data.source = {source!r}: iteration {iteration} holds {found} rollouts, but "
                f"data.problems_per_iteration x data.rollouts_per_problem is {config.rollouts_per_iteration}"
            )
        weights = config.train.reward_weights or {}
        return rollouts.form_groups(
            [group.problem for group in groups],
            [[replace(each, verdict=weighed(each.verdict, weights)) for each in group.rollouts] for group in groups],
            config.train.scale_rewards,
            config.train.multi_objective_aggregation,
        )

    groups_of(wanted - 1)  # groups of another size are refused now rather than in an iteration
    return Recording(groups_of, _backend(client, run_id), kept)


def _backend(client: Any, run_id: str) -> str:
    """Return what sampled the rollouts of a run: its backend, or that of the run whose rollouts it was trained on."""
    path = tracking.artifact(client, run_id, "config/resolved.yaml")
    content = yaml12.load(path.read_text(), str(path))
    before, own = run_id_of(content["data"].get("source", "live")), str(content["generation"]["backend"])
    try:
        return own if before is None else _backend(client, before)
    except StoreAway:
        raise
    except UserError:  # it was deleted since
        return own
