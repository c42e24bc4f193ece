"""What happened in a case, as a line of the results."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Record:
    """One case: a kill, an outage, or `count` inputs; it is bad if anything differs or is wrong.

    `said` are the errors that its processes ended with, which may be as they should.
    """

    number: int
    seed: int
    point: str
    signal: str
    struck: bool = False
    codes: list[int] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    seconds: float = 0.0
    count: int = 1
    figures: dict[str, float] = field(default_factory=dict)
