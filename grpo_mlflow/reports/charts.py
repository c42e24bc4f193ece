"""What the page's script draws: charts of marks, as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

# Okabe and Ito 2008, "Color universal design": told apart whatever colours the eye sees; the yellow is too light.
BLUE, RED, GREEN, ORANGE = "#0072b2", "#d55e00", "#009e73", "#e69f00"
PINK, SKY, BLACK = "#cc79a7", "#56b4e9", "#1d2430"
COLORS = (BLUE, RED, GREEN, PINK, ORANGE, SKY, BLACK)
DASHED, DOTTED = (6.0, 4.0), (2.0, 3.0)
MOST_POINTS = 600  # of one line: more than a page has pixels for
_DECADES = 1.5  # between the lowest and the highest value, from which on a log axis shows more

Values = Sequence[float | None]


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis: its label with the unit, and its scale. `start` and `end` are shown even if no value is there.

    `categories` are the words at places 0, 1 and so on.
    """

    label: str
    log: bool = False
    whole: bool = False
    start: float | None = None
    end: float | None = None
    categories: Sequence[str] = ()

    def content(self) -> dict[str, Any]:
        found: dict[str, Any] = {"label": self.label, "log": self.log, "whole": self.whole}
        if self.categories:
            found["categories"] = list(self.categories)
        named = {"from": self.start, "to": self.end}
        return found | {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Mark:
    """Points, a line through them, or steps: the value at x holds up to the next.

    A value of None is a gap. `low` and `high` are intervals: a band around a line, bars at points. `of` says of each
    point which of the page's names belongs to it. Without a label the legend leaves it out.
    """

    kind: Literal["line", "steps", "points"]
    label: str
    x: Sequence[float]
    y: Values
    color: str = BLUE
    low: Values = ()
    high: Values = ()
    of: Sequence[int] = ()
    dash: Sequence[float] = ()
    width: float = 2.0
    shape: Literal["dot", "cross", "diamond"] = "dot"

    def content(self) -> dict[str, Any]:
        style = {"kind": self.kind, "label": self.label, "color": self.color, "width": self.width}
        found: dict[str, Any] = {**style, "x": list(self.x), "y": list(self.y), "shape": self.shape}
        for name in ("low", "high", "of", "dash"):
            if values := getattr(self, name):
                found[name] = list(values)
        return found


@dataclass(frozen=True, slots=True)
class Lines:
    """Many lines of one kind; each is the number of its name, its x values and its y values."""

    label: str
    lines: Sequence[tuple[int, Sequence[float], Sequence[float]]]
    color: str
    dash: Sequence[float] = ()
    width: float = 1.5
    alpha: float = 1.0
    shape: Literal["dot", "cross"] = "dot"

    def content(self) -> dict[str, Any]:
        style = {"kind": "lines", "label": self.label, "color": self.color, "width": self.width, "alpha": self.alpha}
        lines = [[of, list(x), list(y)] for of, x, y in self.lines]
        return {**style, "lines": lines, "shape": self.shape, "dash": list(self.dash)}


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart. `hover` says what the pointer finds: all values at the nearest x, or the nearest point."""

    title: str
    x: Axis
    y: Axis
    marks: Sequence[Mark | Lines]
    note: str = ""
    wide: bool = False
    hover: Literal["x", "point"] = "x"

    def content(self) -> dict[str, Any]:
        axes = {"x": self.x.content(), "y": self.y.content()}
        return {**axes, "hover": self.hover, "marks": [mark.content() for mark in self.marks]}


def fits_log(values: Sequence[float | None]) -> bool:
    """Return whether values are all above 0 and so far apart that a log axis shows more of them."""
    known = [value for value in values if value is not None]
    return bool(known) and min(known) > 0 and math.log10(max(known) / min(known)) >= _DECADES


def thinned(count: int, most: int = MOST_POINTS) -> list[int]:
    """Return which of `count` points are kept: evenly spread, the first and the last among them.

    >>> thinned(3), thinned(7, 3)
    ([0, 1, 2], [0, 3, 6])
    """
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]
