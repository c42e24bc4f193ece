"""A task that is another one in all that it does not change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from grpo_mlflow.tasks.base import Pending, Task
from grpo_mlflow.types import Completion, Problem, Split, Verdict


class Wrapped(Task):
    """Does what `task` does."""

    def __init__(self, task: Task) -> None:
        self.name, self.phrases, self.reward_range = task.name, task.phrases, task.reward_range
        self._task = task

    def problem(self, split: Split, seed: int) -> Problem:
        return self._task.problem(split, seed)

    def verify(self, problem: Problem, text: str) -> Verdict:
        return self._task.verify(problem, text)

    def begin(self, problems: Sequence[Problem], completions: Sequence[Completion]) -> Pending:
        return self._task.begin(problems, completions)

    def at(self, iteration: int, iterations: int) -> None:
        self._task.at(iteration, iterations)

    def figures(self) -> Mapping[str, float]:
        return self._task.figures()

    def logged(self) -> Mapping[str, tuple[float, int]]:
        return self._task.logged()

    def reference_answer(self, problem: Problem) -> str:
        return self._task.reference_answer(problem)

    def demonstration(self, problem: Problem, rng: np.random.Generator, error_rate: float) -> str:
        return self._task.demonstration(problem, rng, error_rate)

    def chance(self, problem: Problem) -> float:
        return self._task.chance(problem)
