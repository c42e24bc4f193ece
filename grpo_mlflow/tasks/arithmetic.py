"""Integer arithmetic: "12+34=? Number only."

The answer is the whole completion: one integer in decimal digits, nothing else but white space around it. Products
bind before sums and differences.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from grpo_mlflow.tasks.base import Task, draw
from grpo_mlflow.types import Problem, Split, Verdict

WEIGHTS = {"correct": 0.9, "format": 0.1}
_INTEGER = re.compile(r"-?[0-9]{1,100}")


class Arithmetic(Task):
    """`terms` operands of `digits` digits each, joined by operations drawn from `operations`."""

    name = "arithmetic"
    phrases: tuple[str, ...] = ("=? Number only.",)

    def __init__(self, operations: Sequence[str] = ("+",), digits: int = 2, terms: int = 2) -> None:
        self.operations, self.digits, self.terms = tuple(operations), digits, terms

    def problem(self, split: Split, seed: int) -> Problem:
        def propose(rng: np.random.Generator) -> tuple[tuple[int, ...], tuple[str, ...]]:
            lowest = 10 ** (self.digits - 1) if self.digits > 1 else 0
            operands = tuple(int(n) for n in rng.integers(lowest, 10**self.digits, size=self.terms))
            return operands, tuple(str(op) for op in rng.choice(self.operations, size=self.terms - 1))

        def key(content: tuple[tuple[int, ...], tuple[str, ...]]) -> str:
            operands, operations = content
            commutes = len(set(operations)) == 1 and operations[0] in "+*"
            return f"{sorted(operands) if commutes else list(operands)}{operations}"

        operands, operations = draw(self.name, split, seed, propose, key)
        expression = str(operands[0]) + "".join(f"{op}{n}" for op, n in zip(operations, operands[1:], strict=True))
        return Problem(
            id=f"{self.name}/{split}/{seed}",
            seed=seed,
            messages=({"role": "user", "content": f"{expression}{self.phrases[0]}"},),
            payload={"answer": _value(operands, operations)},
        )

    def verify(self, problem: Problem, text: str) -> Verdict:
        answer = text.strip()
        parsed = answer if _INTEGER.fullmatch(answer) else None
        success = parsed is not None and int(parsed) == problem.payload["answer"]
        parts = {"correct": WEIGHTS["correct"] * success, "format": WEIGHTS["format"] * (parsed is not None)}
        return Verdict(reward=math.fsum(parts.values()), parts=parts, success=success, parsed=parsed)

    def reference_answer(self, problem: Problem) -> str:
        return str(problem.payload["answer"])

    def demonstration(self, problem: Problem, rng: np.random.Generator, error_rate: float) -> str:
        """A wrong demonstration has one wrong digit."""
        answer = self.reference_answer(problem)
        if rng.random() >= error_rate:
            return answer
        sign, digits = ("-", answer[1:]) if answer.startswith("-") else ("", answer)
        place = int(rng.integers(len(digits)))
        lowest = 1 if place == 0 and len(digits) > 1 else 0
        wrong = [d for d in map(str, range(lowest, 10)) if d != digits[place]]
        return sign + digits[:place] + str(rng.choice(wrong)) + digits[place + 1 :]

    def chance(self, problem: Problem) -> float:
        """Answers with the right number of digits, each equally likely."""
        return float(10.0 ** -len(self.reference_answer(problem).lstrip("-")))


def _value(operands: Sequence[int], operations: Sequence[str]) -> int:
    total, product, sign = 0, operands[0], 1
    for operation, operand in zip(operations, operands[1:], strict=True):
        if operation == "*":
            product *= operand
        else:
            total += sign * product
            product, sign = operand, 1 if operation == "+" else -1
    return total + sign * product
