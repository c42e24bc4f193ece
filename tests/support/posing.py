"""Tasks of one wording: an answer that is fixed, missing, or asked for at great length."""

from __future__ import annotations

from collections.abc import Sequence

from grpo_mlflow.errors import ConfigError
from grpo_mlflow.tasks import Task
from grpo_mlflow.types import Problem, Verdict


class Repeated(Task):
    """Asks for the same text every time (None: the task does not know it); the problems of seeds in `long` are long."""

    name = "repeated"

    def __init__(self, answer: str | None = "yes", long: Sequence[int] = (), times: int = 400) -> None:
        self._answer, self._long, self._times = answer, {*long}, times

    def problem(self, split: str, seed: int) -> Problem:
        more = " Think." * self._times if seed in self._long else ""
        messages = ({"role": "user", "content": f"Question {seed} :{more}"},)
        return Problem(f"{self.name}/{split}/{seed}", seed, messages, {})

    def verify(self, problem: Problem, text: str) -> Verdict:
        success = self._answer is None or text == self._answer
        return Verdict(float(success), {"right": float(success)}, success, parsed=text)

    def reference_answer(self, problem: Problem) -> str:
        if self._answer is None:
            raise ConfigError("the task has no answers of its own")
        return self._answer
