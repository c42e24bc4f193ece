"""Lines that fit a terminal: folded at words, with what belongs to a label below it. Commands and paths stay whole."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterator
from typing import TextIO

_COMMAND = re.compile(r"([A-Z_]+=\S+ )*(\S*/)?(grpo|python[\d.]*|mlflow) \S")
_LABEL = re.compile(r" *(\S+(?: \S+)?  +){1,2}")  # `best              `, `ok      device                `
_WIDEST_LABEL = 32
_AT_THE_END = re.compile(rf"(.*\S:) ({_COMMAND.pattern}.*)")
_TOGETHER = re.compile(r" (?=[-+\d.]+\])| (?== )|(?<= =) ")  # spaces in `[0.1, 0.2]` and `train.lr = 1e-4`
_QUOTED = re.compile(r"`[^`]+`")
_HELD = "\0"


def fitted(text: str, stream: TextIO) -> str:
    """Return text with lines that fit the terminal that a stream is; unchanged if it is none.

    Whatever COLUMNS says: it is set for many a process without a terminal, and what reads a file reads it by lines.
    """
    columns = _columns(stream)
    return text if columns is None else folded(text, columns)


def folded(text: str, columns: int) -> str:
    """Return text with no line longer than `columns`, but for a command, a path or another word that is longer alone.

    What was copied from the screen must work, so a command is never divided: it gets a line of its own.
    """
    return "\n".join(line for each in text.split("\n") for line in _lines(each, columns))


def _columns(stream: TextIO) -> int | None:
    try:
        if not stream.isatty():
            return None
        return max(20, int(os.environ.get("COLUMNS", 0)) or os.get_terminal_size(stream.fileno()).columns)
    except (OSError, ValueError):  # closed, or a terminal that does not tell
        return None


def _lines(line: str, columns: int) -> Iterator[str]:
    indent = len(line) - len(line.lstrip(" "))
    if len(line) <= columns or _COMMAND.match(line, indent):
        yield line
        return
    if (ends := _AT_THE_END.fullmatch(line)) is not None:
        yield from _lines(ends[1], columns)
        yield f"{' ' * indent}  {ends[2]}"
        return
    label = _LABEL.match(line)
    start = label[0] if label and len(label[0]) <= _WIDEST_LABEL else " " * indent
    rest = line[len(start) :]
    if start.strip() and (" " not in rest or _COMMAND.match(rest)):
        yield start.rstrip()
        yield f"{' ' * indent}  {rest}"
        return
    hang = " " * (len(start) if start.strip() else indent + 4)
    yield from _filled(rest, start, hang, columns)


def _filled(text: str, start: str, hang: str, columns: int) -> Iterator[str]:
    """Yield lines of the parts of a text, which two spaces divide; a part is divided only if it fits no line."""
    line = start
    for part in re.split(r"(?<=\S)  +", text):
        gap = "  " if line.strip() and line not in (start, hang) else ""
        if len(line) + len(gap) + len(part) <= columns:
            line += gap + part
            continue
        if gap:
            yield line
            line = hang
        fill = textwrap.TextWrapper(columns, line, hang, break_long_words=False, break_on_hyphens=False)
        *before, line = fill.wrap(_held(part)) or [line]
        yield from (each.replace(_HELD, " ") for each in before)
        line = line.replace(_HELD, " ")
    yield line


def _held(text: str) -> str:
    """Return text with a mark in the place of each space at which it may not be divided."""
    text = _QUOTED.sub(lambda match: match[0].replace(" ", _HELD), text)
    return _TOGETHER.sub(_HELD, text)
