"""Built-in rewards that look at a text and the right answer: 0 to 1, or None for a row without what they need."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from grpo_mlflow.tasks.base import folded, untagged
from grpo_mlflow.tasks.numbers import final_number
from grpo_mlflow.tasks.tables.fields import as_text
from grpo_mlflow.types import Problem


class Scorer(Protocol):
    """Says what a text is worth.

    A class of this kind raises ValueError for options that it cannot use.
    """

    def score(self, problem: Problem, text: str, tokens: int | None) -> float | None:
        """Return a number from 0 to 1, None where it does not apply; `tokens` is the length, where it is known."""
        ...


def answers_of(problem: Problem) -> list[str] | None:
    """Return the answers that a row accepts, or None where it has none."""
    answer = problem.payload.get("answer")
    if answer is None:
        return None
    return [as_text(each) for each in (answer if isinstance(answer, list) else [answer])]


@dataclass(frozen=True, slots=True)
class Exact:
    """1 for the answer in the one pair of tags or as the whole text; case and white space make no difference."""

    def score(self, problem: Problem, text: str, tokens: int | None) -> float | None:
        if (answers := answers_of(problem)) is None:
            return None
        given = untagged(text)
        return float(given is not None and folded(given) in map(folded, answers))


@dataclass(frozen=True, slots=True)
class Contains:
    """1 if the answer, or `text`, stands anywhere in the completion; case and white space make no difference."""

    text: str | None = None

    def __post_init__(self) -> None:
        if self.text is not None and not (isinstance(self.text, str) and self.text.strip()):
            raise ValueError(f"text = {self.text!r}; allowed: a text, or null for the answer")

    def score(self, problem: Problem, text: str, tokens: int | None) -> float | None:
        wanted = answers_of(problem) if self.text is None else [self.text]
        if wanted is None:
            return None
        return float(any(folded(each) in folded(text) for each in wanted))


@dataclass(frozen=True, slots=True)
class Number:
    """1 if the final number of the text is that of the answer, as exact fractions (docs/tasks.md)."""

    def score(self, problem: Problem, text: str, tokens: int | None) -> float | None:
        if (answers := answers_of(problem)) is None:
            return None
        wanted = [final_number(answer) for answer in answers]
        if None in wanted:
            raise ValueError(f"the answer {answers[wanted.index(None)]!r} holds no single number")
        return float(final_number(text) in wanted)


@dataclass(frozen=True, slots=True)
class Tags:
    """1 if the text has one pair of each of the tags, in this order and with something in it, and no other of them."""

    names: Sequence[str] = ("SOLUTION",)

    def __post_init__(self) -> None:
        if isinstance(self.names, str) or not self.names or not all(_is_name(name) for name in self.names):
            raise ValueError(f"names = {self.names!r}; allowed: a list of names such as [think, answer]")

    def score(self, problem: Problem, text: str, tokens: int | None) -> float | None:
        place = 0
        for name in self.names:
            opened, closed = f"<{name}>", f"</{name}>"
            if text.count(opened) != 1 or text.count(closed) != 1:
                return 0.0
            start, end = text.find(opened), text.find(closed)
            if start < place or not text[start + len(opened) : end].strip():
                return 0.0
            place = end
        return 1.0


@dataclass(frozen=True, slots=True)
class Length:
    """1 from `at_least` to `at_most` words (characters, tokens), falling on lines to 0 at none and at twice as many."""

    at_most: int | None = None
    at_least: int | None = None
    unit: Literal["words", "characters", "tokens"] = "words"

    def __post_init__(self) -> None:
        for name, value in (("at_most", self.at_most), ("at_least", self.at_least)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} = {value!r}; allowed: 1 or more")
        if self.at_most is None and self.at_least is None:
            raise ValueError("has neither at_most nor at_least; allowed: one of them, or both")
        if (self.at_least or 0) > (self.at_most or self.at_least or 0):
            raise ValueError(f"at_least = {self.at_least} is more than at_most = {self.at_most}")
        if self.unit not in ("words", "characters", "tokens"):
            raise ValueError(f"unit = {self.unit!r}; allowed: words, characters, tokens")

    def score(self, problem: Problem, text: str, tokens: int | None) -> float | None:
        if self.unit == "tokens":
            if tokens is None:  # a text that no model wrote
                return None
            count = tokens
        else:
            count = len(text.split()) if self.unit == "words" else len(text)
        if self.at_least is not None and count < self.at_least:
            return count / self.at_least
        if self.at_most is not None and count > self.at_most:
            return max(0.0, 2.0 - count / self.at_most)
        return 1.0


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[\w:.-]+", name) is not None


KINDS: dict[str, type[Any]] = {
    "exact": Exact,
    "contains": Contains,
    "number": Number,
    "tags": Tags,
    "length": Length,
}
