"""Signals at any line of what a call does, in whatever package."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


def send(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


@contextmanager
def at_every_line(reached: Callable[[], None]) -> Iterator[None]:
    """Call `reached` at each line and each return of what the block calls, in whatever package."""

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if event != "call":
            reached()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def count_lines(call: Callable[[], object]) -> int:
    lines: list[None] = []
    with at_every_line(lambda: lines.append(None)):
        call()
    return len(lines)


@contextmanager
def send_at(moment: int) -> Iterator[None]:
    """Send SIGINT at that line of what the block calls."""
    lines: list[None] = []

    def reached() -> None:
        lines.append(None)
        if len(lines) == moment:
            send()

    with at_every_line(reached):
        yield
