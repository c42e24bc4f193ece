"""GSM8K: grade school word problems whose answer is one number (Cobbe et al. 2021, arXiv 2110.14168).

Rows have `question` and `answer`; the gold number stands after `####` in the answer. A seed names a row: training seeds
of the train split, evaluation seeds of the test split, each counted modulo the rows of its split. `success` needs the
right number, compared as an exact fraction; see `numbers` for how it is found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from grpo_mlflow.tasks import rows
from grpo_mlflow.tasks.base import Task, tagged, untagged
from grpo_mlflow.tasks.numbers import final_number, is_number
from grpo_mlflow.types import Problem, Split, Verdict

WEIGHTS = {"correct": 0.9, "tags": 0.05, "only_number": 0.05}
_INSTRUCTION = "\n\nThink step by step, then give the number alone inside <SOLUTION></SOLUTION>."


class Gsm8k(Task):
    """Problems of a local copy (`path`), or of openai/gsm8k where it is None."""

    name = "gsm8k"

    def __init__(self, path: str | None = None) -> None:
        self.splits: Mapping[Split, Sequence[rows.Row]] = rows.load(path)

    def problem(self, split: Split, seed: int) -> Problem:
        table = self.splits[split]
        row = table[seed % len(table)]
        return Problem(
            id=f"{self.name}/{split}/{seed}",
            seed=seed,
            messages=({"role": "user", "content": row.question + _INSTRUCTION},),
            payload={"answer": row.number},
        )

    def verify(self, problem: Problem, text: str) -> Verdict:
        number = final_number(text)
        success = number is not None and number == Fraction(problem.payload["answer"])
        content = untagged(text)
        tags = number is not None and content is not None and content != text.strip()
        held = {"correct": success, "tags": tags, "only_number": tags and is_number(content or "")}
        parts = {name: WEIGHTS[name] * value for name, value in held.items()}
        parsed = None if number is None else str(number)
        return Verdict(reward=math.fsum(parts.values()), parts=parts, success=success, parsed=parsed)

    def reference_answer(self, problem: Problem) -> str:
        return tagged(problem.payload["answer"])
