"""Where an iteration's groups come from: sampled now, sampled while the last one was trained on, or recorded.

With `generation.async_rollouts` = 1, iteration i + 1 is sampled by the version that iteration i started from, while
iteration i is trained: one step off-policy (as in Noukhovitch et al. 2024, arXiv 2410.18252). Each completion carries
the version that sampled it, and the sampler correction weighs it by the policy that is trained.

With `data.resample_rounds` > 0, groups whose rewards are all equal give their places to groups of further problems
(dynamic sampling: Yu et al. 2025, DAPO, arXiv 2503.14476, section 3.2). In each round as many problems are sampled as
there are such groups left; those that are flat too are dropped. After the last round the flat ones that are left stay:
they carry no signal, and count in every denominator as they always do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from grpo_mlflow.algorithm.statistics import mean
from grpo_mlflow.config import Config
from grpo_mlflow.generation import Begun, Generator, Overlapping
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.runtime.processes import Processes
from grpo_mlflow.tasks import Task
from grpo_mlflow.training import rollout_files, rollout_metrics, rollouts
from grpo_mlflow.training.checkpoint import Checkpoint
from grpo_mlflow.types import Group, Problem, Prompt, Rollout

AHEAD = "ahead.jsonl"  # in a checkpoint: the groups of its iteration, where they were sampled ahead


def read_ahead(checkpoint: Checkpoint) -> tuple[int, list[Group]] | None:
    """Return the iteration that a checkpoint's run had sampled ahead, and its groups; None where it had not."""
    path = checkpoint.path / "trainer" / AHEAD
    return (checkpoint.iteration, rollout_files.read(path)) if path.is_file() else None


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
        """Return what the rollouts say (`rollouts.metrics`), of `first`: a choice by reward would flatter them."""
        found = rollout_metrics.metrics(self.first)
        if self.further is not None:
            found |= rollout_metrics.advantage_metrics(self.groups)
            found["resampled_problems"] = float(len(self.further))
            found["resampled_flat_frac"] = mean([group.is_flat for group in self.further]) if self.further else 0.0
            found["flat_group_frac_trained"] = mean([group.is_flat for group in self.groups])
        return found


@dataclass(frozen=True, slots=True)
class _Ahead:
    """An iteration that is being sampled ahead."""

    version: int
    problems: Sequence[Problem]
    prompts: Sequence[Prompt]
    begun: Begun


class Collector:
    """Gives the groups of each iteration, in order.

    Args:
        recorded: returns the groups of an iteration of an earlier run; None where they are sampled.
        ahead: groups that were sampled ahead before a resume, with their iteration.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        policy: Policy,
        generator: Generator,
        processes: Processes,
        recorded: Callable[[int], list[Group]] | None = None,
        ahead: tuple[int, list[Group]] | None = None,
    ) -> None:
        self._config, self._task, self._policy = config, task, policy
        self._generator, self._processes, self._recorded = generator, processes, recorded
        self._begun: _Ahead | None = None
        self._settled = ahead

    def collect(self, version: int) -> Collected:
        """Return the groups of an iteration; processes share the work and all return the whole."""
        if self._recorded:
            recorded = self._recorded
            groups = self._processes.agreed(lambda: recorded(version))
            return Collected(groups, groups)
        self.settle()
        self._generator.sync(version)
        if self._settled and self._settled[0] == version:
            first = self._settled[1]
        else:
            problems = self._problems(version)
            first = self._form(problems, self._sample(problems, ("train", version)))
        collected = self._resample(version, first) if self._config.data.resample_rounds else Collected(first, first)
        self._settled = None  # not before: what was sampled ahead must outlive a server that fails
        if self._config.generation.async_rollouts and version + 1 < self._config.train.iterations:
            self._begin(version + 1)
        return collected

    def settle(self) -> None:
        """Wait for what is being sampled ahead."""
        if self._begun is not None:
            ahead, completions = self._begun, self._begun.begun.result()
            judged = rollouts.judge(self._task, ahead.problems, ahead.prompts, completions)
            self._settled = (ahead.version, self._form(ahead.problems, judged))
            self._begun = None

    def stop(self) -> None:
        """Keep what has been sampled ahead, if all of it has; else drop it."""
        if self._begun is not None and self._begun.begun.succeeded():
            self.settle()
        if self._begun is not None:
            self._begun.begun.cancel()
            self._begun = None

    def save(self, path: Path) -> None:
        """Write what was sampled ahead, so that a resumed run trains on the very same."""
        if self._settled is not None:
            rollout_files.write(path, self._settled[1])

    def metrics(self, evaluator: Generator) -> dict[str, float]:
        """Return what the generators met since the last call, that of evaluations included."""
        own, other = self._generator.metrics(), evaluator.metrics()
        return {name: own.get(name, 0.0) + other.get(name, 0.0) for name in own | other}

    def _resample(self, version: int, first: list[Group]) -> Collected:
        """Return an iteration whose flat groups have made room for others, as far as the rounds reach."""
        data = self._config.data
        seeds = rollouts.further_seeds(
            data.train_seed_start, data.num_train_seeds, set(self._seeds(version)), version, self._config.seed
        )
        chosen, further = list(first), list[Group]()
        for number in range(data.resample_rounds):
            places = [place for place, group in enumerate(chosen) if group.is_flat]
            drawn, seeds = seeds[: len(places)], seeds[len(places) :]
            if not drawn:
                break
            problems = [self._task.problem("train", seed) for seed in drawn]
            groups = self._form(problems, self._sample(problems, ("train", version, "resample", number)))
            further += groups
            for place, group in zip(places, [group for group in groups if not group.is_flat], strict=False):
                chosen[place] = group
        # anew: the advantages of `batch` scaling depend on all groups of the iteration
        chosen = self._form([group.problem for group in chosen], [group.rollouts for group in chosen])
        return Collected(chosen, first, further)

    def _sample(self, problems: Sequence[Problem], key: tuple[str | int, ...]) -> list[list[Rollout]]:
        def sample() -> list[list[Rollout]]:
            return rollouts.collect(
                self._task,
                self._policy,
                self._generator,
                self._processes.own(problems),
                self._config.data.rollouts_per_problem,
                rollouts.training_sampling(self._config.generation),
                self._config.seed,
                key,
            )

        return self._processes.together(self._processes.agreed(sample))

    def _begin(self, version: int) -> None:
        problems = self._problems(version)
        prompts = [self._policy.prompt(problem) for problem in problems]
        generator = cast(Overlapping, self._generator)  # `config.checks` allows async_rollouts with servers only
        begun = generator.begin(
            prompts,
            self._config.data.rollouts_per_problem,
            rollouts.training_sampling(self._config.generation),
            self._config.seed,
            ("train", version),
        )
        self._begun = _Ahead(version, problems, prompts, begun)

    def _problems(self, version: int) -> list[Problem]:
        return [self._task.problem("train", seed) for seed in self._seeds(version)]

    def _seeds(self, version: int) -> list[int]:
        data = self._config.data
        return rollouts.seeds_of_iteration(
            data.train_seed_start, data.num_train_seeds, data.problems_per_iteration, version, self._config.seed
        )

    def _form(self, problems: Sequence[Problem], judged: Sequence[Sequence[Rollout]]) -> list[Group]:
        return rollouts.form_groups(problems, judged, self._config.train.scale_rewards)
