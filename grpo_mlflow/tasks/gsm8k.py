"""GSM8K: grade school word problems whose answer is one number (Cobbe et al. 2021, arXiv 2110.14168).

Rows (see `tables`) have `question` and `answer`; the gold number stands after `####` in the answer. A seed names a row:
training seeds of the train split, evaluation seeds of the test split, each counted modulo the rows of its split.
`success` needs the right number, compared as an exact fraction; see `numbers` for how it is found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

from grpo_mlflow.errors import ConfigError
from grpo_mlflow.tasks.base import Task, tagged, untagged
from grpo_mlflow.tasks.numbers import bare_number, final_number, is_number
from grpo_mlflow.tasks.tables import places, splits
from grpo_mlflow.types import Problem, Split, Verdict

WEIGHTS = {"correct": 0.9, "tags": 0.05, "only_number": 0.05}
HUB = "openai/gsm8k:main"
_INNER = "main"  # in the whole repository; `socratic` beside it holds the same questions
_INSTRUCTION = "\n\nThink step by step, then give the number alone inside <SOLUTION></SOLUTION>."


@dataclass(frozen=True, slots=True)
class Row:
    """A question and its gold number, as a fraction in text: `1450` or `-1/2`."""

    question: str
    number: str


class Gsm8k(Task):
    """Problems of a local copy (`path`), or of openai/gsm8k where it is None."""

    name = "gsm8k"

    def __init__(self, path: str | None = None) -> None:
        self.table = load(path)
        self.splits: Mapping[Split, Sequence[Row]] = self.table.rows

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


def load(path: str | None) -> splits.Splits[Row]:
    """Return the rows of both splits; files that have not changed are read once.

    Raises:
        ConfigError: the path holds no such rows.
        UserError: the hub gives none.
    """
    return _loaded(path, None if path is None else places.stamp(path, _INNER))


@lru_cache(maxsize=2)
def _loaded(path: str | None, stamp: object) -> splits.Splits[Row]:
    if path is None:
        source = _source("data.gsm8k.path = null", HUB)
        return splits.of_parts(source, _row, *places.apart(places.hub_parts(source.key, HUB)))
    return splits.load(_source("data.gsm8k.path", path), _row)


def _source(key: str, path: str) -> splits.Source:
    return splits.Source(key=key, path=path, name="gsm8k", suffixes=(".parquet", ".jsonl"), inner=_INNER)


def _row(record: Any, where: str) -> splits.Asked[Row]:
    try:
        question, answer = record["question"], record["answer"]
        question.encode()  # half of a surrogate pair is no text: neither a tokenizer nor a file takes it
        number = bare_number(answer.rpartition("####")[2].strip().removesuffix("."))
    except (KeyError, TypeError, AttributeError, UnicodeError):
        number = None
    if number is None or not isinstance(question, str):
        raise ConfigError(
            f"{where} is not of GSM8K; allowed: texts `question` and `answer`, the answer ending in #### and a number"
        )
    return splits.Asked(question, str(number), Row(question, str(number)))
