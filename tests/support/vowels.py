"""A task that an untrained model neither solves nor misses: no group of completions has one reward."""

from __future__ import annotations

from grpo_mlflow.tasks import Task
from grpo_mlflow.types import Problem, Verdict


class Vowels(Task):
    """The more of a text are vowels, the better."""

    name = "vowels"

    def problem(self, split: str, seed: int) -> Problem:
        messages = ({"role": "user", "content": f"Tell me something about the number {seed}."},)
        return Problem(f"{self.name}/{split}/{seed}", seed, messages, {})

    def verify(self, problem: Problem, text: str) -> Verdict:
        share = sum(letter in "aeiou" for letter in text.lower()) / max(1, len(text))
        return Verdict(share, {"vowels": share}, share > 0.4, parsed=text)

    def reference_answer(self, problem: Problem) -> str:
        return "aeiou"
