"""Random satisfiable 3-SAT, answered with one bit per variable inside <SOLUTION> tags.

With difficulty d (drawn per problem from a range): 4 + floor(5.5 d) to 4 + floor(11 d) variables and 5 + floor(7.5 d)
to 5 + floor(15 d) clauses of three distinct variables, each negated with probability 1/2. Formulas without a solution
are drawn again. At the default range 0.3 to 0.7 random bits solve about a quarter of the problems.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from grpo_mlflow.tasks.base import Task, draw
from grpo_mlflow.types import Problem, Split, Verdict

Clauses = tuple[tuple[int, ...], ...]  # literals as in DIMACS: 3 is x3, -3 is NOT x3

_MALFORMED = -0.2  # so that guessing a form pays more than giving none
# A part is weight times value.
PARTS = {
    "strict_format": 0.15 * 0.3,
    "tags": 0.10 * 0.2,
    "bit_count": 0.15 * 0.3,
    "nothing_after": 0.10 * 0.2,
    "only_bits": 0.05 * 0.1,
}
_OPEN, _CLOSE = "<SOLUTION>", "</SOLUTION>"


class Sat(Task):
    """3-SAT with the difficulty of each problem drawn from the range `difficulty`, within 0 to 1."""

    name = "sat"
    phrases: tuple[str, ...] = (
        "Set x1 to x",
        " to 0 or 1 so that ",
        " holds. Answer as ",
        "<SOLUTION>0 1 ...</SOLUTION>",
        "(NOT x1 OR x2 OR NOT x3) AND (x1",
        "0</SOLUTION>",
    )
    reward_range: tuple[float, float] = (_MALFORMED, 1.0 + sum(PARTS.values()))

    def __init__(self, difficulty: tuple[float, float] = (0.3, 0.7)) -> None:
        self.difficulty = difficulty

    def problem(self, split: Split, seed: int) -> Problem:
        def propose(rng: np.random.Generator) -> tuple[int, Clauses]:
            d = float(rng.uniform(*self.difficulty))
            variables = 4 + int(rng.integers(math.floor(5.5 * d), math.floor(11 * d), endpoint=True))
            count = 5 + int(rng.integers(math.floor(7.5 * d), math.floor(15 * d), endpoint=True))
            while True:
                clauses = tuple(
                    tuple(
                        int(v) * (1 if rng.random() < 0.5 else -1)
                        for v in 1 + rng.choice(variables, size=3, replace=False)
                    )
                    for _ in range(count)
                )
                if _solutions(variables, clauses).any():
                    return variables, clauses

        def key(content: tuple[int, Clauses]) -> str:
            variables, clauses = content
            return f"{variables} {sorted(sorted(clause) for clause in clauses)}"

        variables, clauses = draw(self.name, split, seed, propose, key)
        formula = " AND ".join(f"({' OR '.join(_literal(v) for v in clause)})" for clause in clauses)
        first, to, answer, form = self.phrases[:4]
        return Problem(
            id=f"{self.name}/{split}/{seed}",
            seed=seed,
            messages=({"role": "user", "content": f"{first}{variables}{to}{formula}{answer}{form}"},),
            payload={"variables": variables, "clauses": clauses},
        )

    def verify(self, problem: Problem, text: str) -> Verdict:
        variables = problem.payload["variables"]
        start, end = text.find(_OPEN), text.find(_CLOSE)
        one = 0 <= start < end and text.count(_OPEN) == text.count(_CLOSE) == 1
        content = text[start + len(_OPEN) : end] if one else ""
        only_bits = bool(re.fullmatch(r"\s*[01](\s+[01])*\s*", content))
        bits = [bit == "1" for bit in re.findall("[01]", content)] if only_bits else []
        parsed = " ".join("1" if bit else "0" for bit in bits) if len(bits) == variables else None
        success = parsed is not None and _satisfies(bits, problem.payload["clauses"])
        held = {
            "strict_format": bool(re.fullmatch(r"[01]( [01])*", content)),
            "tags": one,
            "bit_count": only_bits and len(bits) == variables,
            "nothing_after": one and text.rstrip().endswith(_CLOSE),
            "only_bits": only_bits,
        }
        parts = {"correct": 1.0 if success else 0.0 if parsed is not None else _MALFORMED}
        parts |= {name: PARTS[name] * value for name, value in held.items()}
        return Verdict(reward=math.fsum(parts.values()), parts=parts, success=success, parsed=parsed)

    def reference_answer(self, problem: Problem) -> str:
        return _tagged(self._assignments(problem, True)[0])

    def demonstration(self, problem: Problem, rng: np.random.Generator, error_rate: float) -> str:
        """A right one agrees with as many literals as a solution can; a wrong one is any that fails."""
        right = rng.random() >= error_rate
        candidates = self._assignments(problem, right)
        if right:  # a rule that a model can pick up: mostly give each variable its more frequent sign
            literals = np.array(problem.payload["clauses"])
            agreement = (candidates[:, np.abs(literals) - 1] == (literals > 0)).sum(axis=(1, 2))
            candidates = candidates[agreement == agreement.max()]
        return _tagged(candidates[int(rng.integers(len(candidates)))])

    def chance(self, problem: Problem) -> float:
        """The share of all assignments that satisfy."""
        return float(_solutions(problem.payload["variables"], problem.payload["clauses"]).mean())

    @staticmethod
    def _assignments(problem: Problem, satisfying: bool) -> NDArray[np.bool_]:
        variables = problem.payload["variables"]
        chosen = _solutions(variables, problem.payload["clauses"]) == satisfying
        return np.asarray(_table(variables)[chosen])


def _literal(value: int) -> str:
    return f"x{value}" if value > 0 else f"NOT x{-value}"


def _tagged(bits: Sequence[bool] | NDArray[np.bool_]) -> str:
    return _OPEN + " ".join("1" if bit else "0" for bit in bits) + _CLOSE


@lru_cache(maxsize=16)
def _table(variables: int) -> NDArray[np.bool_]:
    """Every assignment: (2^n, n)."""
    return np.asarray((np.arange(2**variables)[:, None] >> np.arange(variables)[::-1]) & 1 == 1)


def _solutions(variables: int, clauses: Clauses) -> NDArray[np.bool_]:
    """Which rows of the table satisfy all clauses: (2^n,)."""
    literals = np.array(clauses)
    values = _table(variables)[:, np.abs(literals) - 1] == (literals > 0)
    return np.asarray(values.any(axis=2).all(axis=1))


def _satisfies(bits: Sequence[bool], clauses: Clauses) -> bool:
    return all(any(bits[abs(v) - 1] == (v > 0) for v in clause) for clause in clauses)
