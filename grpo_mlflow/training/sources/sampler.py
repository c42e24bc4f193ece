"""Training problems of an iteration, and their groups sampled with a generator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from grpo_mlflow.config import Config
from grpo_mlflow.generation import Begun, Generator, Overlapping, Resting, training_sampling, weights
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.runtime.processes import Processes
from grpo_mlflow.tasks import Task
from grpo_mlflow.training import rollouts
from grpo_mlflow.types import Group, Problem, Prompt, Rollout


@dataclass(frozen=True, slots=True)
class InFlight:
    """Problems that are being sampled; `begun` has the completions of the process's `own`, whose prompts are these."""

    problems: Sequence[Problem]
    own: Sequence[Problem]
    prompts: Sequence[Prompt]
    begun: Begun


class Sampler:
    """Samples, judges and groups completions of training problems, as the config says.

    Processes share the work, and each gets all groups.
    """

    def __init__(self, config: Config, task: Task, policy: Policy, generator: Generator, processes: Processes) -> None:
        self._config, self._task, self._policy = config, task, policy
        self.generator, self._processes = generator, processes

    def seeds(self, version: int) -> list[int]:
        """Return the seeds of an iteration's own problems."""
        data = self._config.data
        return rollouts.seeds_of_iteration(
            data.train_seed_start, data.num_train_seeds, data.problems_per_iteration, version, self._config.seed
        )

    def further_seeds(self, version: int) -> list[int]:
        """Return the seeds of all other training problems, in an order of the iteration's own."""
        data = self._config.data
        return rollouts.further_seeds(
            data.train_seed_start, data.num_train_seeds, set(self.seeds(version)), version, self._config.seed
        )

    def at(self, version: int) -> None:
        """Tell the task which iteration the completions are for that it judges next."""
        self._task.at(version, self._config.train.iterations)

    def problems(self, seeds: Sequence[int]) -> list[Problem]:
        return [self._task.problem("train", seed) for seed in seeds]

    def sample(self, seeds: Sequence[int], key: tuple[str | int, ...]) -> list[Group]:
        """Return a group for each problem, with random draws keyed by `key`."""
        problems, sampling = self.problems(seeds), training_sampling(self._config.generation)

        def own_share() -> list[list[Rollout]]:
            return rollouts.collect(
                self._task,
                self._policy,
                self.generator,
                self._processes.own(problems),
                k=self._config.data.rollouts_per_problem,
                sampling=sampling,
                seed=self._config.seed,
                key=key,
            )

        with self._processes.inside(weights(self.generator)):
            judged = self._processes.agreed(own_share)
        judged = rollouts.priced(self.generator, judged, sampling, self._processes)
        return self.form(problems, self._processes.together(judged))

    def rest(self) -> None:
        """Let a server give up its GPU's memory until it is next asked, if it is to (`generation.server.sleep`)."""
        if self._config.generation.server.sleep:
            self._processes.agreed(cast(Resting, self.generator).rest)

    @property
    def is_alone(self) -> bool:
        """Whether no other process has a share in the work."""
        return self._processes.count == 1

    def begin(self, seeds: Sequence[int], key: tuple[str | int, ...]) -> InFlight:
        """Begin to sample what `sample` would, and return at once."""
        generator = cast(Overlapping, self.generator)  # `config.checks` allows async_rollouts with servers only
        sampling, problems = training_sampling(self._config.generation), self.problems(seeds)
        own = self._processes.own(problems)

        def begun() -> InFlight:
            prompts = rollouts.render(self._policy, own, sampling.max_new_tokens)
            k, seed = self._config.data.rollouts_per_problem, self._config.seed
            return InFlight(problems, own, prompts, generator.begin(prompts, k, sampling, seed, key))

        return self._processes.agreed(begun)

    def judge(self, sampled: InFlight, version: int, on_sampled: Callable[[], None]) -> list[Group]:
        """Wait for completions of iteration `version`, call `on_sampled`, and return their groups."""

        def own_share() -> list[list[Rollout]]:
            completions = sampled.begun.result()
            on_sampled()
            self.at(version)
            return rollouts.judge(self._task, sampled.own, sampled.prompts, completions)

        return self.form(sampled.problems, self._processes.together(self._processes.agreed(own_share)))

    def form(self, problems: Sequence[Problem], judged: Sequence[Sequence[Rollout]]) -> list[Group]:
        """Return groups with their advantages; `batch` scaling takes the groups given here as its batch."""
        train = self._config.train
        return rollouts.form_groups(problems, judged, train.scale_rewards, train.multi_objective_aggregation)


def iteration_key(version: int) -> tuple[str | int, ...]:
    """Return the key of an iteration's draws: the same whether they are sampled at once or ahead."""
    return ("train", version)
