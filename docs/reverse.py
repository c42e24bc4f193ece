"""A task of one's own: write a word backwards."""

from grpo_mlflow.tasks import Task, draw
from grpo_mlflow.types import Problem, Verdict


class Reverse(Task):
    name = "reverse"

    def __init__(self, length=3):
        self.length = length

    def problem(self, split, seed):
        word = draw(self.name, split, seed, lambda rng: "".join(rng.choice(list("abcdef"), self.length)), str)
        messages = ({"role": "user", "content": f"Write {word} backwards. Only the word."},)
        return Problem(f"{self.name}/{split}/{seed}", seed, messages, {"answer": word[::-1]})

    def verify(self, problem, text):
        answer = text.strip()
        success = answer == problem.payload["answer"]
        parts = {"correct": 0.9 * success, "length": 0.1 * (len(answer) == self.length)}
        return Verdict(sum(parts.values()), parts, success, parsed=answer or None)

    def reference_answer(self, problem):
        return problem.payload["answer"]
