"""What is said of work that takes long: how far it is and how long it will take, in a plain line now and then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_FIRST, _NEXT = 15.0, 60.0  # seconds before the first line, and between the others
_SLOW = 5.0  # seconds of work that need no word


def duration(seconds: float) -> str:
    """Return a time as people say it: `45s`, `3 min`, `2.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f}s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


@contextmanager
def told_if_slow(say: Callable[[str], None], text: str, seconds: float = _SLOW) -> Iterator[None]:
    """Say what is being done in the block if it takes longer than so many seconds."""
    timer = threading.Timer(seconds, say, (text,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Pace:
    """Watches one piece of work after another.

    Args:
        say: takes a line.
        clock: returns seconds.
    """

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._clock = say, clock
        self._what, self._most, self._began, self._next = "", False, 0.0, float("inf")

    def begin(self, what: str, *, at_most: bool = False) -> None:
        """Begin to watch a piece of work; `at_most`: it may end before all of it is done, as completions do."""
        self._what, self._most, self._began = what, at_most, self._clock()
        self._next = self._began + _FIRST

    def at(self, share: float) -> None:
        """Note which share of the work is done, 0 to 1; cheap enough to be called for every token."""
        now = self._clock()
        if now < self._next:
            return
        self._next, spent = now + _NEXT, now - self._began
        text = f"{self._what}: {share:.0%} after {duration(spent)}"
        if share > 0:
            left = duration(spent / share - spent)
            text += f", {'at most' if self._most else 'about'} {left} left"
        self._say(text)

    def wait(self) -> float:
        """Return the seconds until the next line, for who has to wake up to write it."""
        return max(0.0, self._next - self._clock())
