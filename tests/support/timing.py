"""Calls that must not take long, whatever the machine does meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_SECONDS = 2.0


def quick(call: Callable[[], T]) -> T:
    """Return what `call` returns if it takes less than two seconds of this thread's processor time.

    A machine that stands still makes any call slow once; what is slow in itself is so three times.
    """
    for _ in range(3):
        start = time.thread_time()
        result = call()
        if time.thread_time() - start < _SECONDS:
            return result
    raise AssertionError(f"took more than {_SECONDS:.0f} s three times")
