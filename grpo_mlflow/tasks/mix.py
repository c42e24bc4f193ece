"""Several tasks in one run: the seed of a problem draws its task by weight, and the problem is that task's own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from grpo_mlflow import seeding
from grpo_mlflow.tasks.base import Task
from grpo_mlflow.types import Problem, Split, Verdict

_ID = re.compile(r"mix/(.+)/(?:train|eval)/[0-9]+")


def member_of(problem_id: str) -> str | None:
    """Return the task that a problem of a mix is of, or None where it is of no mix."""
    match = _ID.fullmatch(problem_id)
    return match[1] if match else None


class Mix(Task):
    """Problems of `tasks`, by name, in proportion to `weights`."""

    name = "mix"

    def __init__(self, tasks: Mapping[str, Task], weights: Mapping[str, float]) -> None:
        self.tasks = dict(tasks)
        self.phrases = tuple(phrase for task in tasks.values() for phrase in task.phrases)
        lowest, highest = zip(*(task.reward_range for task in tasks.values()), strict=True)
        self.reward_range = min(lowest), max(highest)
        self._names = sorted(tasks)  # the order in which they are written makes no difference
        total = sum(weights[name] for name in self._names)
        self._shares = [weights[name] / total for name in self._names]

    def problem(self, split: Split, seed: int) -> Problem:
        name = str(seeding.stream(seed, "mix", split).choice(self._names, p=self._shares))
        return replace(self.tasks[name].problem(split, seed), id=f"{self.name}/{name}/{split}/{seed}")

    def verify(self, problem: Problem, text: str) -> Verdict:
        return self._member(problem).verify(problem, text)

    def reference_answer(self, problem: Problem) -> str:
        return self._member(problem).reference_answer(problem)

    def demonstration(self, problem: Problem, rng: np.random.Generator, error_rate: float) -> str:
        return self._member(problem).demonstration(problem, rng, error_rate)

    def chance(self, problem: Problem) -> float:
        return self._member(problem).chance(problem)

    def _member(self, problem: Problem) -> Task:
        return self.tasks[str(member_of(problem.id))]
