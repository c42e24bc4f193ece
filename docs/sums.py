"""Small sums, for a model that can add but would rather talk: the last number of the text is the answer."""

import re

from grpo_mlflow.tasks import Task, draw
from grpo_mlflow.types import Problem, Verdict


class Sums(Task):
    name = "sums"

    def problem(self, split, seed):
        a, b = draw(self.name, split, seed, lambda rng: (int(rng.integers(1, 21)), int(rng.integers(1, 10))), str)
        messages = ({"role": "user", "content": f"What is {a} + {b}?"},)
        return Problem(f"{self.name}/{split}/{seed}", seed, messages, {"answer": a + b})

    def verify(self, problem, text):
        numbers = re.findall(r"\d{1,9}", text)
        success = bool(numbers) and int(numbers[-1]) == problem.payload["answer"]
        return Verdict(float(success), {"correct": float(success)}, success, parsed=numbers[-1] if numbers else None)

    def reference_answer(self, problem):
        return str(problem.payload["answer"])
