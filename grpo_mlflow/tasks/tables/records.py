"""The records of a file, one by one, each with the number of its row.

A row is what an editor or a spreadsheet calls one: the line of a jsonl file, the row of a csv file with its header as
row 1, and the place in a json list or a parquet table, from 1. What cannot be read is told with its row. Only one
record is held at a time, but for a json file, whose text is.
"""

from __future__ import annotations

import csv
import importlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from grpo_mlflow.errors import one_line

_BOM = b"\xef\xbb\xbf"  # some editors begin a file with it
_WIDE = (b"\xff\xfe", b"\xfe\xff")  # how a file of UTF-16 begins
_SPACE = re.compile(r"\s*")
_LONGEST_CELL = 2**31 - 1  # csv's own limit is 131,072 characters
_ROWS_AT_ONCE = 1000  # of a parquet file

Numbered = Iterator[tuple[int, Any]]


class Unreadable(ValueError):
    """A file cannot be read: what is wrong, and in which row."""


# JSON has no nan and no infinity; Python's own writes them, and they are no value here
_DECODER = json.JSONDecoder(parse_constant=lambda name: None)
_STRICT = json.JSONDecoder(parse_constant=lambda name: None, object_pairs_hook=lambda pairs: _distinct(pairs))


def read(file: Path) -> Numbered:
    """Yield the records of a file with their rows.

    Raises:
        Unreadable: the file, or the row that comes next, cannot be read.
    """
    try:
        yield from READERS[file.suffix.lower()](file)
    except OSError as error:
        raise Unreadable(one_line(error)) from None


def pack(record: Any) -> bytes:
    """Return a record as JSON. What JSON lacks is null in it, except dates and decimals, which are texts.

    Raises:
        UnicodeError: it holds half of a surrogate pair, which no tokenizer and no file takes.
    """
    return _ENCODER.encode(record).encode()


def unpack(packed: bytes) -> Any:
    """Return the record that was packed."""
    return _DECODER.decode(packed.decode())


def _plain(value: Any) -> Any:
    if isinstance(value, Decimal):
        return str(value)
    if hasattr(value, "tolist"):  # numbers and arrays of numpy
        return value.tolist()
    return value.isoformat() if hasattr(value, "isoformat") else None


_ENCODER = json.JSONEncoder(ensure_ascii=False, default=_plain)


def _jsonl(file: Path) -> Numbered:
    with file.open("rb") as stream:
        for row, line in enumerate(stream, start=1):
            if text := _text(line, row).strip("\ufeff \t\r\n"):
                yield row, _decoded(text, row)


def _json(file: Path) -> Numbered:
    text = _text(file.read_bytes(), None).removeprefix("\ufeff")
    start = _end_of_space(text, 0)
    if text[start : start + 1] == "[":
        yield from _elements(text, start + 1)
        return
    try:
        whole = _STRICT.decode(text)
    except RecursionError:
        raise Unreadable("is nested too deeply") from None
    except ValueError as error:
        if not str(error).startswith("Extra data"):
            raise Unreadable(one_line(error)) from None
        yield from _jsonl(file)  # rows of jsonl under the other name
        return
    lists = [value for value in whole.values() if _is_table(value)] if isinstance(whole, dict) else []
    if len(lists) == 1:
        yield from enumerate(lists[0], start=1)
    elif isinstance(whole, dict) and not lists:
        yield 1, whole
    else:
        raise Unreadable("is no list of rows; allowed: a list of objects, or an object that holds one such list")


def _is_table(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


def _elements(text: str, place: int) -> Numbered:
    """Yield the elements of a list whose bracket ends at `place`: all at once would take ten times their text."""
    row, place = 0, _end_of_space(text, place)
    while text[place : place + 1] != "]" or row:
        row += 1
        try:
            value, place = _STRICT.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise Unreadable(f"row {row}: {_why(error)}") from None
        yield row, value
        place = _end_of_space(text, place)
        if text[place : place + 1] == "]":
            break
        if text[place : place + 1] != ",":
            what = "is followed by something else than a comma" if text[place:].strip() else "is the last, and no ]"
            raise Unreadable(f"row {row}: {what} follows" if what.endswith("]") else f"row {row}: {what}")
        place = _end_of_space(text, place + 1)
    if text[place + 1 :].strip():
        raise Unreadable("goes on after the end of its list")


def _end_of_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    return found.end() if found else place


def _csv(file: Path) -> Numbered:
    csv.field_size_limit(_LONGEST_CELL)
    with file.open("rb") as stream:
        lines = (_text(line, row).removeprefix("\ufeff") for row, line in enumerate(stream, start=1))
        first = next(lines, "")
        # what spreadsheets write where the comma is the decimal sign, and when asked for tabs
        delimiter = "," if "," in first else next((mark for mark in "\t;" if mark in first), ",")
        rows = csv.reader(_after(first, lines), delimiter=delimiter, skipinitialspace=True, strict=True)
        row = 1
        try:
            header = [name.strip() for name in next(rows, [])]
            if len(set(header)) < len(header):
                raise Unreadable(f"row 1: the header names a column twice: {', '.join(header)}")
            for row, cells in enumerate(rows, start=2):
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise Unreadable(f"row {row}: has {len(cells)} cells, the header {len(header)}")
                yield row, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise Unreadable(f"row {row + 1}: {one_line(error)}") from None


def _after(first: str, others: Iterable[str]) -> Iterator[str]:
    yield first
    yield from others


def _parquet(file: Path) -> Numbered:
    try:
        table = importlib.import_module("pyarrow.parquet").ParquetFile(file)
        row = 0
        for batch in table.iter_batches(_ROWS_AT_ONCE):
            for row, record in enumerate(batch.to_pylist(), start=row + 1):  # noqa: B020 - goes on from batch to batch
                yield row, plain(record)
    except Unreadable:
        raise
    except Exception as error:  # pyarrow's errors have no base of their own
        raise Unreadable(one_line(error)) from None


def plain(record: Any) -> Any:
    """Return a record of a library's own types as JSON would have it.

    Raises:
        Unreadable: it cannot be.
    """
    try:
        return unpack(pack(record))
    except (ValueError, TypeError, RecursionError) as error:
        raise Unreadable(_why(error)) from None


def _text(content: bytes, row: int | None) -> str:
    """Return the text of a file, or of a row of it."""
    where = "" if row is None else f"row {row}: "
    if row in (None, 1) and content.startswith(_WIDE):
        raise Unreadable("is UTF-16; allowed: UTF-8")
    if b"\0" in content:
        raise Unreadable(f"{where}is no text: holds a NUL; allowed: UTF-8")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise Unreadable(f"{where}is not UTF-8: byte {content[error.start]:#x}") from None


def _decoded(text: str, row: int) -> Any:
    try:
        return _STRICT.decode(text)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"row {row}: {_why(error)}; allowed: one JSON object per line") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return found


def _why(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "is nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"is no JSON: {error.msg} at character {error.colno}"
    return one_line(error)


READERS: Mapping[str, Callable[[Path], Numbered]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
"""How a file is read, by the end of its name."""
