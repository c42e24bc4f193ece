"""Rows as two splits that share no question: each question once, and one that is in both parts is evaluated only.

Questions that differ in case or white space alone are one. Rows that no name tells apart are split by the hash of their
question, so that a row keeps its split when others are added.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from grpo_mlflow.errors import ConfigError
from grpo_mlflow.tasks.base import EVAL_SHARE, place_of
from grpo_mlflow.tasks.tables import places
from grpo_mlflow.types import Split

LEAST = 2  # evaluation rows: fewer have no interval
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Asked(Generic[T]):
    """A row: its question, its answer (both as texts, to compare rows by), and what is kept of it."""

    question: str
    answer: str
    kept: T


@dataclass(frozen=True, slots=True)
class Source:
    """Where rows come from: the setting, its value, and how they are told apart.

    `name` is that of the task; `share` is the part that is evaluated of rows that no name tells apart.
    """

    key: str
    path: str
    name: str
    suffixes: Sequence[str]
    inner: str = ""
    eval_key: str = ""
    eval_path: str | None = None
    share: float = EVAL_SHARE


@dataclass(frozen=True, slots=True)
class Splits(Generic[T]):
    """The rows of both splits, their digests, and how many were left out.

    `repeated` rows ask what another one of their split asks, `conflicting` of these with another answer; `shared` ones
    are training rows that evaluation rows ask as well.
    """

    rows: Mapping[Split, Sequence[T]]
    digests: Mapping[Split, str]
    repeated: int
    conflicting: int
    shared: int

    def counts(self) -> str:
        """Return the counts in words."""
        train, held_out = len(self.rows["train"]), len(self.rows["eval"])
        left_out = [f"{self.repeated} duplicate{'s' * (self.repeated > 1)}{self._conflicts()}"] if self.repeated else []
        left_out += [f"{self.shared} also in evaluation, so not trained on"] if self.shared else []
        words = f" ({', '.join(left_out)})" if left_out else ""
        return f"{train + held_out} distinct{words}, {train} train, {held_out} evaluation"

    def _conflicts(self) -> str:
        return f", {self.conflicting} of them with another answer" if self.conflicting else ""


def load(source: Source, parse: Callable[[Any, str], Asked[T]]) -> Splits[T]:
    """Read the rows of a source; `parse` takes a record and words that tell where it stands.

    Raises:
        ConfigError: it holds no such rows, or too few.
        UserError: the hub does not give them.
    """
    parts = places.parts_of(source.key, source.path, source.suffixes, source.inner)
    train, held_out = places.apart(parts)
    if source.eval_path is not None:
        others = places.parts_of(source.eval_key, source.eval_path, source.suffixes, source.inner)
        held_out = places.apart(others)[1] or others
    splits = of_parts(source, parse, train, held_out)
    for name, rows in splits.rows.items():
        if not rows:
            raise ConfigError(f"{source.key} = {source.path!r}: leaves no row for the {name} split; allowed: more rows")
    return splits


def of_parts(
    source: Source,
    parse: Callable[[Any, str], Asked[T]],
    train: Sequence[places.Part],
    held_out: Sequence[places.Part],
) -> Splits[T]:
    """Return the rows of parts; without any that are `held_out`, those of `train` are split by their hash."""
    gathered = _Gathered[T](source.name)

    def asked(parts: Iterable[places.Part]) -> Iterator[Asked[T]]:
        return (parse(record, where) for part in parts for where, record in part.read())

    first, shared = gathered.distinct(asked(held_out)), 0
    rest = gathered.distinct(asked(train))
    if held_out:
        shared = len(first.keys() & rest.keys())
    else:
        first = {place: rest[place] for place in _lowest(rest, source.share)}
    split: dict[Split, list[_Row[T]]] = {
        "train": [row for place, row in rest.items() if place not in first],
        "eval": [row for place, row in (first if held_out else rest).items() if place in first],
    }
    return Splits(
        rows={name: [row.kept for row in rows] for name, rows in split.items()},
        digests={name: _joined(row.digest for row in rows) for name, rows in split.items()},
        repeated=gathered.repeated,
        conflicting=gathered.conflicting,
        shared=shared,
    )


class _Row(NamedTuple, Generic[T]):
    """What is kept of a row, and what tells it from others: the texts themselves would take twice the memory."""

    kept: T
    digest: bytes
    answer: int


class _Gathered(Generic[T]):
    """Rows by the place of their question, each question once."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.repeated = self.conflicting = 0

    def distinct(self, rows: Iterable[Asked[T]]) -> dict[int, _Row[T]]:
        """Return the first row of each question, in order."""
        found: dict[int, _Row[T]] = {}
        for row in rows:
            place, answer = place_of(self._name, row.question), hash(row.answer)
            if (known := found.get(place)) is not None:
                self.repeated += 1
                self.conflicting += known.answer != answer
            else:
                text = f"{row.question}\0{row.answer}".encode(errors="surrogatepass")
                found[place] = _Row(row.kept, hashlib.blake2b(text, digest_size=8).digest(), answer)
        return found


def _lowest(found: Iterable[int], share: float) -> list[int]:
    """Return the places below the share; the two lowest where fewer are, unless nothing would be left to train on."""
    ordered = sorted(found)
    below = sum(place / 2**64 < share for place in ordered)
    return ordered[: below if len(ordered) <= LEAST else max(below, LEAST)]


def _joined(digests: Iterable[bytes]) -> str:
    return hashlib.blake2b(b"".join(digests), digest_size=16).hexdigest()
