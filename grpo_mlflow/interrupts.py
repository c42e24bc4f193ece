"""Ctrl-C and SIGTERM as an exception that never arrives in the middle of a write.

Inside `handled()` a first signal raises `Interrupted` at once, wherever the program is; inside `deferred()` it waits
for the end of the block. A second Ctrl-C gives up waiting. Outside the main thread nothing is changed.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(BaseException):
    """The person or the scheduler asked the run to stop. Not an Exception: no handler swallows it by accident."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class _State:
    depth = 0
    pending: int | None = None
    stopping = False


def _handle(signum: int, frame: FrameType | None) -> None:
    if _State.stopping or _State.pending is not None:
        if signum == signal.SIGINT:  # a second Ctrl-C; a second SIGTERM is often the same request passed on
            raise KeyboardInterrupt
        return
    if _State.depth:
        _State.pending = signum
        os.write(2, b"\nstopping as soon as what is under way is whole; Ctrl-C again gives that up\n")
        return
    _State.stopping = True
    raise Interrupted(signum)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def handled() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into `Interrupted` inside the block. Inside another such block, that one does it."""
    if not _in_main_thread() or signal.getsignal(signal.SIGINT) is _handle:
        yield
        return
    before = {number: signal.signal(number, _handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _State.depth, _State.pending, _State.stopping = 0, None, False


@contextmanager
def deferred() -> Iterator[None]:
    """Hold a signal back until the block has ended, then raise it. An exception of the block itself goes first."""
    if not _in_main_thread():
        yield
        return
    _State.depth += 1
    try:
        yield
    except BaseException:
        if _State.depth == 1:
            _State.pending = None
        raise
    finally:
        _State.depth -= 1
    if _State.depth == 0 and _State.pending is not None:
        signum, _State.pending, _State.stopping = _State.pending, None, True
        raise Interrupted(signum)
