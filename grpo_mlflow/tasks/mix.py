"""Several tasks in one run: the seed of a problem draws its task by weight, and the problem is that task's own."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from grpo_mlflow import seeding
from grpo_mlflow.tasks.base import Pending, Task
from grpo_mlflow.types import Completion, Problem, Split, Verdict

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

    def begin(self, problems: Sequence[Problem], completions: Sequence[Completion]) -> Pending:
        places: dict[str, list[int]] = {}
        for place, problem in enumerate(problems):
            places.setdefault(str(member_of(problem.id)), []).append(place)
        pending = [
            (own, self.tasks[name].begin([problems[i] for i in own], [completions[i] for i in own]))
            for name, own in places.items()
        ]

        def wait() -> list[Verdict]:
            found = {place: verdict for own, wait in pending for place, verdict in zip(own, wait(), strict=True)}
            return [found[place] for place in range(len(problems))]

        return wait

    def at(self, iteration: int, iterations: int) -> None:
        for task in self.tasks.values():
            task.at(iteration, iterations)

    def figures(self) -> Mapping[str, float]:
        found: Counter[str] = Counter()
        for task in self.tasks.values():
            found.update(task.figures())
        return found

    def logged(self) -> Mapping[str, tuple[float, int]]:
        found: dict[str, tuple[float, int]] = {}
        for task in self.tasks.values():
            for name, (total, count) in task.logged().items():
                before, number = found.get(name, (0.0, 0))
                found[name] = before + total, number + count
        return found

    def reference_answer(self, problem: Problem) -> str:
        return self._member(problem).reference_answer(problem)

    def demonstration(self, problem: Problem, rng: np.random.Generator, error_rate: float) -> str:
        return self._member(problem).demonstration(problem, rng, error_rate)

    def chance(self, problem: Problem) -> float:
        return self._member(problem).chance(problem)

    def _member(self, problem: Problem) -> Task:
        return self.tasks[str(member_of(problem.id))]
