"""Waiting for what another thread, process or machine does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")


def wait_for(condition: Callable[[], Value | None], seconds: float = 240.0) -> Value:
    """Return the first true value of `condition`; fail when there is none for so long."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return value
