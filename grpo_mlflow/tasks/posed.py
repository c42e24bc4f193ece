"""A task as a run poses it: with the run's system prompt, and a price on training completions that run too long."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from grpo_mlflow.tasks.base import Task
from grpo_mlflow.tasks.wrapped import Wrapped
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
        penalty = -min(1.0, over / self.buffer) if over > 0 else 0.0
        found = replace(
            verdict, parts={**verdict.parts, "overlong": penalty}, reward=math.fsum((verdict.reward, penalty))
        )
        if verdict.values is None:
            return found
        weights = {**(verdict.weights or {}), "overlong": 1.0}
        return replace(found, values={**verdict.values, "overlong": penalty}, weights=weights)


def weighed(verdict: Verdict, weights: Mapping[str, float]) -> Verdict:
    """Return a verdict whose rewards by name have these weights; those that are not named keep theirs."""
    if not weights or verdict.values is None:
        return verdict
    known = {**(verdict.weights or {}), **{name: each for name, each in weights.items() if name in verdict.values}}
    parts = {name: known[name] * value for name, value in verdict.values.items() if value is not None}
    return replace(verdict, reward=math.fsum(parts.values()), parts=parts, weights=known)


class Posed(Wrapped):
    """`task` with another system prompt (None: as it is), and what training alone applies.

    That is a length penalty (None: none), and weights of rewards by name that differ from those of evaluations.
    """

    def __init__(
        self,
        task: Task,
        system_prompt: str | None = None,
        overlong: Overlong | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(task)
        self._system_prompt, self._overlong, self._weights = system_prompt, overlong, dict(weights or {})

    def trained(self, verdict: Verdict, completion: Completion) -> Verdict:
        """Return the verdict as training takes it."""
        verdict = weighed(verdict, self._weights)
        return self._overlong.penalise(verdict, completion) if self._overlong else verdict

    def problem(self, split: Split, seed: int) -> Problem:
        problem = self._task.problem(split, seed)
        if self._system_prompt is None:
            return problem
        others = tuple(message for message in problem.messages if message["role"] != "system")
        return replace(problem, messages=({"role": "system", "content": self._system_prompt}, *others))
