"""The final number of a text, as an exact fraction.

An explicit marker wins: one pair of <SOLUTION> or <answer> tags, then the last `####`, the last \\boxed{}, the last
"answer is". Without one the last number of the text counts. Commas, currency signs, percent signs, units and LaTeX
around a number are dropped, "1/2" and "1 1/2" are fractions, ordinals ("5th") are none. Tags, `####` and \\boxed{} that
hold several different numbers give none: a hedge is no answer.

The package math-verify is left out: version 0.9.0 reads 60 of the 79 numbers of tests/tasks/test_gsm8k.py (not "+7", "1
1/2", "2 million", or a tag's number before later text), this reads all, and what it reads beside are unevaluated
expressions such as \\sqrt{16}, which do not state the number that was asked for.
"""

from __future__ import annotations

import re
from fractions import Fraction

_TAG = re.compile(r"<(/?)(?:solution|answer)>", re.IGNORECASE)
_HASHES = re.compile(r"####([^\n]*)")
_PHRASE = re.compile(r"\banswer\s*(?:is|was|=|:)(?:\s*(?:=|:))?", re.IGNORECASE)
_CALCULATION = re.compile(r"(?:[0-9.,$€£¥%\s()+*/\u00d7\u00f7\u00b7\u2212-]*=)+")  # "3 * 4 =" before the number itself

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]{1,100})?|[0-9]{1,100}(?:\.[0-9]{1,100})?|\.[0-9]{1,100})"
_NUMBER = re.compile(
    # a sign touches its number and no operand before it: 10-3 and 10-12 hold no negative number
    r"(?<![0-9A-Za-z])(?<![0-9][.,])(?:(?<![0-9)%])(?P<sign>[-\u2212+]))?[$€£¥]?(?P<inner>[-\u2212])?"
    rf"(?:(?P<whole>[0-9]{{1,100}})\s(?=[0-9]{{1,100}}/))?(?P<number>{_DIGITS})(?:[eE](?P<exponent>[-+]?[0-9]{{1,2}}))?"
    r"(?![0-9]|(?:st|nd|rd|th)\b)(?:\s?/\s?(?P<under>[0-9]{1,100})(?![0-9]|\.[0-9]))?"
    r"(?:\s?(?P<scale>hundred|thousand|million|billion)\b)?"
)
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_VULGAR = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅛": "1/8"}
_PLAIN = (
    (re.compile(r"\\[dt]?frac\s?\{\s*([0-9]{1,100})\s*\}\s?\{\s*([0-9]{1,100})\s*\}"), r" \1/\2"),
    (re.compile(r"([-\u2212])\s(?=[0-9]{1,100}/)"), r"\1"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[,!;:]"), ""),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"(?<=[0-9])[\u00a0\u202f\u2009](?=[0-9]{3}(?![0-9]))"), ""),
    (re.compile(r"([$€£¥])\s+(?=[0-9.])"), r"\1"),
    (re.compile(r"\b(?:USD|EUR|GBP|Rs\.?)\s?(?=[0-9])"), ""),
)


def final_number(text: str) -> Fraction | None:
    """Return the number that a text gives as its answer, or None where it gives none."""
    text = _plain(text)
    tags = list(_TAG.finditer(text))
    if tags:
        if [tag[1] for tag in tags] != ["", "/"]:
            return None
        return _only_number(text[tags[0].end() : tags[1].start()])
    if marked := _HASHES.findall(text):
        return _only_number(marked[-1])
    if (boxed := _last_boxed(text)) is not None:
        return _only_number(boxed)
    if phrases := list(_PHRASE.finditer(text)):
        after = text[phrases[-1].end() :]
        calculation = _CALCULATION.match(after)
        stated = _NUMBER.search(after, calculation.end() if calculation else 0)
        if stated is not None:
            return _value(stated)
    found = list(_NUMBER.finditer(text))
    return _value(found[-1]) if found else None


def is_number(text: str) -> bool:
    """Return whether a text holds one number and nothing beside its currency or percent sign."""
    match = _NUMBER.fullmatch(_plain(text).strip().removesuffix("%"))
    return match is not None and _value(match) is not None


def _plain(text: str) -> str:
    for sign, fraction in _VULGAR.items():
        text = text.replace(sign, f" {fraction}")
    for pattern, replacement in _PLAIN:
        text = pattern.sub(replacement, text)
    return text


def _last_boxed(text: str) -> str | None:
    """Return the content of the last \\boxed{...}, braces inside it balanced."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, first = 0, start + len("\\boxed")
    for place in range(first, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[first + 1 : place]
    return None


def _only_number(content: str) -> Fraction | None:
    content = re.sub(r"^\s*(?:[-\u2212]|minus|negative)\s+(?=[0-9$€£¥.])", "-", content)
    calculation = content.rfind("=")
    values = {_value(match) for match in _NUMBER.finditer(content, calculation + 1)}
    return values.pop() if len(values) == 1 else None


def _value(match: re.Match[str]) -> Fraction | None:
    value = Fraction(match["number"].replace(",", ""))
    if match["exponent"]:
        value *= Fraction(10) ** int(match["exponent"])
    if match["under"]:
        if int(match["under"]) == 0:
            return None
        value /= int(match["under"])
    if match["whole"]:
        value += int(match["whole"])
    value *= _SCALES.get(match["scale"] or "", 1)
    return -value if (match["sign"] or "+") != "+" or match["inner"] else value
