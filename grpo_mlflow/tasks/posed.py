"""A task as a run poses it: with the run's system prompt, and a price on training completions that run too long."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from grpo_mlflow.tasks.base import Task
from grpo_mlflow.types import Completion, Problem, Split, Verdict


@dataclass(frozen=True, slots=True)
class Overlong:
    """Soft overlong punishment (DAPO, arXiv 2503.14476, equation 13), in tokens.

    0 up to `limit - buffer` tokens, falling on a line to -1 at `limit`, which a completion that was cut off has.
    """

    limit: int
    buffer: int

    def penalise(self, verdict: Verdict, completion: Completion) -> Verdict:
        """Return the verdict with the penalty as a part of its reward; `success` stays what it is."""
        over = len(completion.token_ids) - (self.limit - self.buffer)
        parts = {**verdict.parts, "overlong": -min(1.0, over / self.buffer) if over > 0 else 0.0}
        return replace(verdict, parts=parts, reward=math.fsum((verdict.reward, parts["overlong"])))


class Posed(Task):
    """`task` with another system prompt (None: as it is) and a length penalty that training applies (None: none)."""

    def __init__(self, task: Task, system_prompt: str | None = None, overlong: Overlong | None = None) -> None:
        self.name, self.phrases, self.overlong = task.name, task.phrases, overlong
        self.reward_range = task.reward_range
        self._task, self._system_prompt = task, system_prompt

    def problem(self, split: Split, seed: int) -> Problem:
        problem = self._task.problem(split, seed)
        if self._system_prompt is None:
            return problem
        others = tuple(message for message in problem.messages if message["role"] != "system")
        return replace(problem, messages=({"role": "system", "content": self._system_prompt}, *others))

    def verify(self, problem: Problem, text: str) -> Verdict:
        return self._task.verify(problem, text)

    def reference_answer(self, problem: Problem) -> str:
        return self._task.reference_answer(problem)

    def demonstration(self, problem: Problem, rng: np.random.Generator, error_rate: float) -> str:
        return self._task.demonstration(problem, rng, error_rate)

    def chance(self, problem: Problem) -> float:
        return self._task.chance(problem)
