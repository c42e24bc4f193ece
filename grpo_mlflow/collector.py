"""Where an iteration's groups come from: sampled now, sampled while the last one was trained on, or recorded.

With `generation.async_rollouts` = 1, iteration i + 1 is sampled by the version that iteration i started from, while
iteration i is trained: one step off-policy (as in Noukhovitch et al. 2024, arXiv 2410.18252). Each completion carries
the version that sampled it, and the sampler correction weighs it by the policy that is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from grpo_mlflow import rollouts
from grpo_mlflow.checkpoint import Checkpoint
from grpo_mlflow.config import Config
from grpo_mlflow.generation import Begun, Generator, Overlapping
from grpo_mlflow.policy import Policy
from grpo_mlflow.processes import Processes
from grpo_mlflow.tasks import Task
from grpo_mlflow.types import Group, Problem, Prompt, Rollout

AHEAD = "ahead.jsonl"  # in a checkpoint: the groups of its iteration, where they were sampled ahead


def read_ahead(checkpoint: Checkpoint) -> tuple[int, list[Group]] | None:
    """Return the iteration that a checkpoint's run had sampled ahead, and its groups; None where it had not."""
    path = checkpoint.path / "trainer" / AHEAD
    return (checkpoint.iteration, rollouts.read(path)) if path.is_file() else None


@dataclass(frozen=True, slots=True)
class _Ahead:
    """An iteration that is being sampled ahead."""

    version: int
    problems: Sequence[Problem]
    prompts: Sequence[Prompt]
    begun: Begun


class Collector:
    """Yields the groups of each iteration in order.

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

    def groups(self, version: int) -> list[Group]:
        """Return the groups of an iteration; processes share the work and all return the whole."""
        if self._recorded:
            recorded = self._recorded
            return self._processes.agreed(lambda: recorded(version))
        self.settle()
        self._generator.sync(version)
        settled, self._settled = self._settled, None  # not before: what is sampled must outlive a sync that fails
        groups = settled[1] if settled and settled[0] == version else self._sample(version)
        if self._config.generation.async_rollouts and version + 1 < self._config.train.iterations:
            self._begin(version + 1)
        return groups

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
            rollouts.write(path, self._settled[1])

    def metrics(self, evaluator: Generator) -> dict[str, float]:
        """Return what the generators met since the last call, that of evaluations included."""
        own, other = self._generator.metrics(), evaluator.metrics()
        return {name: own.get(name, 0.0) + other.get(name, 0.0) for name in own | other}

    def _sample(self, version: int) -> list[Group]:
        problems = self._problems(version)

        def sample() -> list[list[Rollout]]:
            return rollouts.collect(
                self._task,
                self._policy,
                self._generator,
                self._processes.own(problems),
                self._config.data.rollouts_per_problem,
                rollouts.training_sampling(self._config.generation),
                self._config.seed,
                ("train", version),
            )

        return self._form(problems, self._processes.together(self._processes.agreed(sample)))

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
        data = self._config.data
        seeds = rollouts.seeds_of_iteration(
            data.train_seed_start, data.num_train_seeds, data.problems_per_iteration, version, self._config.seed
        )
        return [self._task.problem("train", seed) for seed in seeds]

    def _form(self, problems: Sequence[Problem], judged: Sequence[Sequence[Rollout]]) -> list[Group]:
        return rollouts.form_groups(problems, judged, self._config.train.scale_rewards)
