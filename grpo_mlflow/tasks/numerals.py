"""Numbers in plain notation (see `notation`): where they stand, and what each is worth.

Comma and point. Groups of three digits are thousands: 1,234 and 1.234.567 and 1'234 (and 12,34,567, as in India). One
comma before any other count of digits, or after a 0, is a decimal comma: 3,5 and 0,125. Where both occur the last one
is the decimal sign: 1.234,56. One point is always a decimal point: 1.234. Anything else, such as 1234,567 or 12,34,5,
has no value.

A number has no value either if it is only a part of something: of an expression (2+2), a range (10-12), a ratio or a
time (5:30), a date, a measure of two units (1 hour 30 minutes). A number behind a letter (x2, H2O) or before an ordinal
ending (5th) belongs to a name and is left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction

from grpo_mlflow.tasks.notation import EM_DASH, HARD, ROOT

_LONGEST = 150  # characters of a number; int() raises at some thousand digits
_MOST_TENS = 99
_WINDOW = 24  # characters before a number that tell what it belongs to
_OPEN, _CLOSE = ("(", "["), (")", "]")
_FAR = 60  # characters between two numbers that have nothing to do with each other
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALES |= {"lakh": 10**5, "crore": 10**7, "k": 1000}

_GAP = rf"[ \t{HARD}]{{0,3}}"
_RUN = rf"(?:[0-9]{{1,3}}(?: [0-9]{{3}})+(?![0-9])(?:[.,][0-9]+)?|[0-9]+(?:[.,'_{HARD}][0-9]+)*|(?<![\w.])\.[0-9]+)"
_TOKEN = re.compile(
    rf"(?<![0-9A-Za-z])(?<![0-9A-Za-z]_)(?<![0-9][.,])(?P<run>{_RUN})"
    rf"(?:[eE](?P<exponent>[-+]?[0-9]+)(?![0-9A-Za-z])"
    rf"|{_GAP}[*x\u00d7]{_GAP}10{_GAP}(?:\^|\*\*){_GAP}\(?(?P<tens>[-+]?[0-9]+)\)?"
    r"|(?:\^|\*\*)\(?(?P<power>[-+]?[0-9A-Za-z]+)\)?)?"
    r"(?P<ordinal>(?:\^\s?)?(?:st|nd|rd|th)\b)?"
    rf"(?:[ {HARD}]?/[ {HARD}]?(?P<under>[-+]?{_RUN}))?"
    rf"(?P<scales>(?:[ {HARD}-]?(?i:hundred|thousand|million|billion|trillion|lakh|crore)s?\b){{1,3}}|[kK]\b)?"
)

_VARIABLE = r"(?<![A-Za-z0-9'])[b-hj-zB-HJ-Z]"  # not the words a and I
_MONTH = (
    "(?:January|February|March|April|May|June|July|August|September|October|November|December|"
    r"(?:Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)\b\.?)"
)
_BEFORE = re.compile(
    rf"(?:{ROOT}[ (\[]{{0,3}}|{_VARIABLE}{_GAP}[-+*/\u00d7\u00f7]{_GAP}\(?|[-+]\(|[)\]]\^"
    rf"|{_VARIABLE}\s?[<>]\s?|\b(?:not|half|twice|double|triple|(?:half|third|thirds|quarter|quarters) of)\s{{1,3}}"
    rf"|\b{_MONTH},?\s{{1,3}}(?:[0-9]{{1,2}}(?:st|nd|rd|th)?,?\s{{1,3}})?)$"
)
_AFTER = re.compile(
    rf"{_GAP}\*?{_GAP}{ROOT}|\.?\([0-9]|[.,'_^hxX][0-9A-F]|[xyz](?![A-Za-z])|(?:M|MM|B|mn|bn| [kK])\b"
    rf"|{_GAP}[-+*\u00d7\u00f7]{_GAP}{_VARIABLE}\b"
    rf"| ?(?:tenth|hundredth|thousandth|millionth)s?\b|(?:st|nd|rd|th)?\s{{1,3}}(?:of\s)?{_MONTH}\b"
)
_SPACED_MINUS = re.compile(rf"[=:(\[<>\u2248]{_GAP}-[ \t{HARD}]{{1,3}}$")
_UNIT = (
    r"(?:hours?|hrs?|h|minutes?|mins?|seconds?|secs?|days?|weeks?|months?|years?|dollars?|euros?|cents?|pounds?|lbs?|"
    r"ounces?|oz|feet|foot|ft|inch(?:es)?|yards?|miles?|kilometers?|km|meters?|centimeters?|cm|m|kilograms?|kg|"
    "grams?|g|liters?|ml)\\b|['\"\u2032\u2033]"
)
_MEASURE = re.compile(rf"\s?(?:{_UNIT})(?:,?\sand\s|,?\s|\s?)")
_UNITS = re.compile(rf"\s?(?:{_UNIT})")
_AROUND = rf"[ \t%\u00b0'\"()\[\]{HARD}]{{0,6}}"
_JOINS = re.compile(
    rf"{_AROUND}(?:[-+*/\u00d7\u00f7^~{EM_DASH}]{{1,2}}|[xX]|(?:plus|times|over|divided by|multiplied by|to|through"
    rf"|until|out of|of)\b){_AROUND}|:|[ \t]{{1,3}}:[ \t]{{1,3}}|[.,'_]"
)
_OR = re.compile(r"[^.;!?\n0-9=]{0,40}\bor\b(?:\s(?:is it|it is|is|it|maybe|perhaps|possibly|about|even))?[\s(\[]{0,4}")


@dataclass(frozen=True, slots=True)
class Numeral:
    """A number of a text; its sign lies between `start` and `end`.

    `value` is None where it has none, and `negative` its sign. `joined` tells that it goes with the number before it,
    `loose` that its one space may as well part two numbers, `kind` that it is a whole number or a ratio of two.
    """

    start: int
    end: int
    value: Fraction | None
    negative: bool = False
    joined: bool = False
    loose: bool = False
    kind: str = ""


def numerals(text: str, last: int = 0) -> list[Numeral]:
    """Return the numbers of a text in plain notation, in order; with `last`, those among its so many last ones."""
    found: list[Numeral] = []
    for match in list(_TOKEN.finditer(text))[-last:]:
        if match["ordinal"] or (match["power"] or "") in ("st", "nd", "rd", "th") or _is_exponent(text, match.start()):
            continue
        one = _numeral(text, match)
        if found and (mixed := _mixed(text, found[-1], one)) is not None:
            found[-1] = mixed
        elif found and _goes_with(text, found[-1], one):
            found[-1] = replace(found[-1], value=None)
            found.append(replace(one, value=None, joined=True))
        else:
            found.append(one)
    return found


def differ(text: str, first: Numeral, second: Numeral) -> bool:
    """Return whether a text offers either of two neighbouring numbers: 12 or 13."""
    gap = text[first.end : second.start]
    return first.value != second.value and len(gap) <= _FAR and _OR.fullmatch(gap) is not None


def _is_exponent(text: str, start: int) -> bool:
    """Return whether a number is the exponent of a unit or variable: cm^2."""
    return re.search(r"[A-Za-z]\s?\^$", text[max(0, start - 3) : start]) is not None


def _numeral(text: str, match: re.Match[str]) -> Numeral:
    start, negative, sound = _sign(text, match.start())
    before = text[max(0, match.start() - _WINDOW) : match.start()]
    value = _value(match)
    if not sound or _BEFORE.search(before) or _AFTER.match(text, match.end()):
        value = None
    spaces = match["run"].count(" ")
    if negative and text[start - 1 : start] == text[match.end() : match.end() + 1] == "|":
        value = None
    pair = text[start - 1 : start] in _OPEN and text[match.end() : match.end() + 1] in _CLOSE
    if (spaces and match["under"]) or (pair and _is_decimal_comma(match["run"])):  # 1 100/200, the point (3,4)
        value = None
    if negative and value is not None:
        value = -value
    plain = not (match["exponent"] or match["tens"] or match["power"] or match["scales"])
    kind = "ratio" if match["under"] and plain else "whole" if plain and match["run"].isdigit() else ""
    return Numeral(start, match.end(), value, negative, loose=spaces == 1, kind=kind)


def _sign(text: str, place: int) -> tuple[int, bool, bool]:
    """Return where the number at `place` starts with its sign, whether it is negative, and whether that is sure."""
    before = text[max(0, place - _WINDOW) : place]
    sign, previous = before[-1:], before[-2:-1]
    if sign not in ("-", "+", EM_DASH) or not sign:
        if minus := _SPACED_MINUS.search(before):
            return place - len(before) + minus.start() + 1, True, True
        return place, False, True
    if previous.isdigit() or previous in ("%", "\u00b0"):  # an operator: 10-3
        return place, False, True
    if previous in ("-", "+", EM_DASH, ")", "]") and previous:
        return place, False, False
    if previous.isascii() and previous.isalpha():  # x-5, COVID-19; a dash of a sentence parts words
        return place, False, sign == EM_DASH
    signed = place - 1, sign != "+", True
    ahead = before[:-1].rstrip(f" \t{HARD}")
    if previous and previous in f" \t{HARD}":
        if ahead[-1:].isdigit() or ahead[-1:] == "%":
            return place, False, True
        if re.search(rf"{_VARIABLE}$", ahead) or (sign == EM_DASH and ahead[-1:] not in ("", "\n", "=", ":", "(", "|")):
            return place, False, False
        return signed
    if sign == EM_DASH and previous and previous in ".,;!?":
        return place, False, True
    return signed


def _mixed(text: str, whole: Numeral, part: Numeral) -> Numeral | None:
    """Return 1 1/2 as one number; None where the two are none."""
    gap = text[whole.end : part.start]
    if (whole.kind, part.kind) != ("whole", "ratio") or not re.fullmatch(rf"[ {HARD}]{{1,3}}", gap):
        return None
    if text[part.start : part.start + 1] in ("-", "+"):
        return None
    value = None
    if whole.value is not None and part.value is not None and 0 < part.value < 1:
        value = whole.value - part.value if whole.negative else whole.value + part.value
    return Numeral(whole.start, part.end, value, joined=whole.joined)


def _goes_with(text: str, first: Numeral, second: Numeral) -> bool:
    """Return whether two neighbouring numbers are parts of one thing: 2 + 2, 10 to 12, 1 hour 30 minutes."""
    gap = text[first.end : second.start]
    if len(gap) > _FAR:
        return False
    if _JOINS.fullmatch(gap):
        return not (gap == " to " and re.search(r"\bby\s$", text[: first.start][-4:]))  # it falls by 7 to -3
    if re.fullmatch(r"[A-Za-z% ]{0,20}\sand\s", gap) and re.search(r"\bbetween\s$", text[: first.start][-9:]):
        return True
    return _MEASURE.fullmatch(gap) is not None and _UNITS.match(text, second.end) is not None


def _value(match: re.Match[str]) -> Fraction | None:
    """Return what a match of `_TOKEN` is worth, without its sign."""
    value = _decimal(match["run"])
    tens = match["exponent"] or match["tens"]
    if match["power"]:
        if match["run"] != "10" or not re.fullmatch(r"[-+]?[0-9]{1,2}", match["power"]):
            return None
        value, tens = Fraction(1), match["power"]
    if value is None or (tens and (len(tens) > 4 or abs(int(tens)) > _MOST_TENS)):
        return None
    value *= Fraction(10) ** int(tens or 0)
    if match["under"]:
        under = _decimal(match["under"].lstrip("+-"))
        if not under:
            return None
        value /= -under if match["under"].startswith("-") else under
    for scale in re.findall(r"[a-z]+", (match["scales"] or "").lower()):
        value *= _SCALES[scale.removesuffix("s")]
    return value


def _decimal(run: str) -> Fraction | None:
    """Return the value of digits with separators, by the rule that this module's docstring gives."""
    if len(run) > _LONGEST:
        return None
    marks = re.sub("[0-9]", "", run)
    grouped, decimal = run, ""
    if marks[-1:] in (".", ",") and marks.count(marks[-1]) == 1 and not (marks == "," and _is_thousands(run, ",")):
        grouped, _, decimal = run.rpartition(marks[-1])
        if marks == "," and len(decimal) == 3 and grouped != "0":
            return None
        marks = marks[:-1]
    if len(set(marks)) > 1 or (marks and not _is_thousands(grouped, marks[0])):
        return None
    whole = re.sub("[^0-9]", "", grouped)
    return Fraction(int(whole + decimal or "0"), 10 ** len(decimal))


def _is_decimal_comma(run: str) -> bool:
    return re.fullmatch("[0-9]+,[0-9]+", run) is not None and not _is_thousands(run, ",")


def _is_thousands(digits: str, mark: str) -> bool:
    groups = digits.split(mark)
    if groups[0].startswith("0") or not 1 <= len(groups[0]) <= 3:
        return False
    western = all(len(group) == 3 for group in groups[1:])
    indian = mark == "," and len(groups[0]) <= 2 and len(groups[-1]) == 3 and all(len(g) == 2 for g in groups[1:-1])
    return western or indian
