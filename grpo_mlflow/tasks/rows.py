"""Rows of GSM8K: from a folder, a file, or the hub, as two splits that share no question.

A folder with files of both splits in their names (the hub's layout, such as train-00000-of-00001.parquet and
test-00000-of-00001.parquet) keeps them apart; a question in both counts as test. Whole words of the names count, in
any case: latest.jsonl is no test. Without a test file a validation file is evaluated; with one it is left out, as is a
file whose name says nothing. Any other file or folder is split by the hash of each question. Questions that differ in
case or white space alone are one.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_mlflow.errors import ConfigError, UserError, one_line
from grpo_mlflow.tasks.base import folded, split_of
from grpo_mlflow.tasks.numbers import bare_number
from grpo_mlflow.types import Split

_HUB = "openai/gsm8k"
_SUFFIXES = (".parquet", ".jsonl")
_NAMES = {
    "train": {"train", "training"},
    "test": {"test", "testing"},
    "validation": {"validation", "valid", "val", "dev", "eval", "evaluation"},
}


@dataclass(frozen=True, slots=True)
class Row:
    """A question and its gold number, as a fraction in text: `1450` or `-1/2`."""

    question: str
    number: str


def load(path: str | None) -> Mapping[Split, Sequence[Row]]:
    """Return the rows of both splits.

    Raises:
        ConfigError: the path holds no such rows.
        UserError: the hub gives none.
    """
    if path is None:
        return _apart(_hub("train"), _hub("test"))
    place = Path(os.path.expanduser(path))
    files = [place] if place.is_file() else sorted(place.glob("*"))
    files = [file for file in files if file.suffix.lower() in _SUFFIXES]
    if not files and (place / "main").is_dir():  # the whole repository; `socratic` beside it holds the same questions
        return load(str(place / "main"))
    if not files:
        raise ConfigError(f"data.gsm8k.path = {path!r}: holds no rows; allowed: files that end in .parquet or .jsonl")
    train, test, validation = ([file for file in files if _named(file) == split] for split in _NAMES)
    if place.is_dir() and train and (test or validation):
        splits = _apart(_read_all(train), _read_all(test or validation))
    else:
        split: dict[Split, list[Row]] = {"train": [], "eval": []}
        for row in _distinct(_read_all(files)):
            split[split_of("gsm8k", row.question)].append(row)
        splits = split
    for name, rows in splits.items():
        if not rows:
            raise ConfigError(f"data.gsm8k.path = {path!r}: leaves no row for the {name} split; allowed: more rows")
    return splits


def _named(file: Path) -> str | None:
    """Return the split that the words of a file's name tell: test of gsm8kTest-00000.JSONL, none of latest.jsonl."""
    parted = re.sub("(?<=[a-z0-9])(?=[A-Z])", " ", file.stem)
    words = set(re.findall("[a-z]+", parted.lower()))
    splits = [split for split, names in _NAMES.items() if words & names]
    return splits[0] if splits and (splits[0] != "train" or len(splits) == 1) else None


def _apart(train: Iterable[Row], test: Iterable[Row]) -> Mapping[Split, Sequence[Row]]:
    held_out = _distinct(test)
    questions = {folded(row.question) for row in held_out}
    return {"train": [row for row in _distinct(train) if folded(row.question) not in questions], "eval": held_out}


def _distinct(rows: Iterable[Row]) -> list[Row]:
    """Return the first row of each question."""
    found: dict[str, Row] = {}
    for row in rows:
        found.setdefault(folded(row.question), row)
    return list(found.values())


def _read_all(files: Sequence[Path]) -> Iterator[Row]:
    for file in files:
        yield from _rows(_records(file), f"data.gsm8k.path: {file.name}")


def _records(file: Path) -> list[Any]:
    try:
        if file.suffix.lower() == ".jsonl":
            with file.open(encoding="utf-8") as stream:  # some editors begin a file with a byte order mark
                return [json.loads(line) for line in (line.strip("\ufeff \t\r\n") for line in stream) if line]
        table: list[Any] = importlib.import_module("pyarrow.parquet").read_table(file).to_pylist()
        return table
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"data.gsm8k.path: {file.name}: cannot be read: {one_line(error)}") from None


def _hub(split: str) -> Iterator[Row]:
    try:
        records = importlib.import_module("datasets").load_dataset(_HUB, "main", split=split)
    except Exception as error:  # whatever the hub or the network does
        raise UserError(f"data.gsm8k.path = null: {_HUB} cannot be loaded: {one_line(error)}") from error
    return _rows(records, _HUB)


def _rows(records: Iterable[Any], where: str) -> Iterator[Row]:
    for place, record in enumerate(records, start=1):
        try:
            question, answer = record["question"], record["answer"]
            question.encode()  # half of a surrogate pair is no text: neither a tokenizer nor a file takes it
            number = bare_number(answer.rpartition("####")[2].strip().removesuffix("."))
        except (KeyError, TypeError, AttributeError, UnicodeError):
            number = None
        if number is None or not isinstance(question, str):
            raise ConfigError(
                f"{where}: row {place} is not of GSM8K; allowed: texts `question` and `answer`, the answer ending in "
                "#### and a number"
            )
        yield Row(question, str(number))
