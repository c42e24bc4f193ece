"""The final number of a text, as an exact fraction.

An explicit marker wins: one pair of <SOLUTION> or <answer> tags, then the last `####`, the last \\boxed{}, the last
"answer is". Without one the last number of the text counts. Commas, currency signs, percent signs, units, Markdown and
LaTeX around a number are dropped, "1/2" and "1 1/2" are fractions, ordinals ("5th") are none; `numerals` says what a
comma means. A marker that holds several different numbers gives none, and so does one that stops in the middle: a hedge
is no answer. A single space between thousands (1 450) is read only inside a marker: elsewhere it may part two numbers.

The package math-verify is left out: version 0.9.0 does not read "+7", "1 1/2", "2 million", or a tag's number before
later text, and what it reads beside are unevaluated expressions such as \\sqrt{16}, which do not state the number that
was asked for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from grpo_mlflow.tasks.notation import plain
from grpo_mlflow.tasks.numerals import Numeral, differ, numerals

_TAG = re.compile(r"<(/?)(?:solution|answer)>", re.IGNORECASE)
_HASHES = re.compile(r"####([^\n]*)")
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s?")
_UNBRACED = re.compile(r"[^\s$\\]{0,100}")
_BOXES = re.compile(r"(?:[\s$.;]|\\[()\[\],;]|\\quad|\\text\{\s?(?:or|and)\s?\}|or|and|,){0,40}")
_PHRASE = re.compile(r"\banswer\s{0,9}(?:(?:is|was)\b(?!\s{1,3}not\b)|=|:)(?:\s{0,9}[=:])?", re.IGNORECASE)
_LEADING_MINUS = re.compile(r"^[ \t]{0,9}-\s{1,3}(?=[0-9.])")
_CLAUSE = re.compile(r"\bor\b|[,;]\s{0,3}(?:and\s)?(?=[A-Za-z]\s?=)|\band\s{1,3}(?=[A-Za-z]\s?=)")
_MOST = 2000  # characters in which a marker states its number
_TAIL = 8  # numbers at the end of a text that tell what its last one is
_EQUALS = re.compile(r"[^0-9\n.;]{0,30}=[^0-9\n.;]{0,30}")
_LISTED = re.compile(r"(?:[ \t][A-Za-z%]{1,20}){0,2}[ \t]?,?[ \t]?and[ \t]|,?[ \t]?")


def final_number(text: str) -> Fraction | None:
    """Return the number that a text gives as its answer, or None where it gives none."""
    tags = list(_TAG.finditer(text))
    if tags:
        if [tag[1] for tag in tags] != ["", "/"]:
            return None
        return _only_number(text[tags[0].end() : tags[1].start()])
    if marked := _HASHES.findall(text):
        return _only_number(marked[-1])
    if boxes := list(_BOX.finditer(text)):
        return _boxed_number(text, boxes)
    text = plain(text)
    if phrases := list(_PHRASE.finditer(text)):
        after = _LEADING_MINUS.sub("-", text[phrases[-1].end() :][:_MOST])
        if found := numerals(after):
            return _first_number(after, found)
    found = numerals(text, last=_TAIL)
    if not found or found[-1].loose or (len(found) > 1 and differ(text, *found[-2:])):
        return None
    if len(found) == 1 and "\n" not in text.strip() and _LEADING_MINUS.match(text):  # a list of one, or a minus sign
        return None
    return found[-1].value


def bare_number(text: str) -> Fraction | None:
    """Return the number of a text that holds nothing beside it and its currency or percent sign, None for others."""
    text = plain(text).strip().removesuffix("%").strip()
    found = numerals(text)
    return found[0].value if [(one.start, one.end) for one in found] == [(0, len(text))] else None


def is_number(text: str) -> bool:
    """Return whether a text holds one number and nothing beside its currency or percent sign."""
    return bare_number(text) is not None


def _only_number(content: str) -> Fraction | None:
    """Return the one number of a marker: of a calculation the one after its last equals sign."""
    values: set[Fraction | None] = set()
    for clause in _CLAUSE.split(_LEADING_MINUS.sub("-", plain(content).strip())):
        stated = clause[max(0, clause.rfind("=")) :]
        values |= {numeral.value for numeral in numerals(stated)} if len(stated) <= _MOST else {None}
        if len(values) > 1:
            return None
    return values.pop() if values else None


def _boxed_number(text: str, boxes: Sequence[re.Match[str]]) -> Fraction | None:
    """Return the number of the last box; boxes side by side that differ are a hedge."""
    end, content = _content(text, boxes[-1].end())
    if content is None:
        return None
    number = _only_number(content)
    if len(boxes) > 1:
        end, before = _content(text, boxes[-2].end())
        gap = text[end : boxes[-1].start()]
        side_by_side = re.search("or|and|,", gap) and len(gap) <= 40 and _BOXES.fullmatch(gap)
        if before is not None and side_by_side and _only_number(before) != number:
            return None
    return number


def _content(text: str, first: int) -> tuple[int, str | None]:
    """Return where a box ends whose content starts at `first`, and that content, None if it is not closed."""
    if text[first : first + 1] != "{":
        unbraced = _UNBRACED.match(text, first)
        return (unbraced.end(), unbraced[0]) if unbraced else (first, "")
    depth = 0
    for brace in re.finditer("[{}]", text[first:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return first + brace.end(), text[first + 1 : first + brace.start()]
    return len(text), None


def _first_number(text: str, found: Sequence[Numeral]) -> Fraction | None:
    """Return the number that follows "answer is", a calculation before it left out; a list of several is none."""
    last = 0
    while last + 1 < len(found):
        one, following = found[last : last + 2]
        gap = text[one.end : following.start]
        if not following.joined and not _EQUALS.fullmatch(gap):
            listed = _LISTED.fullmatch(gap) is not None and one.value != following.value
            return None if listed or differ(text, one, following) else one.value
        last += 1
    return found[last].value
