"""Ctrl-C, SIGTERM and SIGHUP as an exception that never arrives in the middle of a write.

Inside `handled()` a first signal raises `Interrupted` at once, wherever the program is; inside `deferred()` it waits
for the end of the block. A second Ctrl-C gives up waiting. Outside the main thread nothing is changed. Where the
exception may have got lost, `check()` raises it again.

Where a run has several processes (`shared`), none of them may stop alone: signals wait but for the blocks that let
them through.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType


class Interrupted(BaseException):
    """The person or the scheduler asked the run to stop. Not an Exception: no handler swallows it by accident."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum, self.exit_code = signum, 128 + signum


class _State:
    depth = 0
    asked: int | None = None
    pending: int | None = None
    stopping = False
    shared = False
    silent = False


def _handle(signum: int, frame: FrameType | None) -> None:
    _State.asked = signum
    if _State.stopping or _State.pending is not None:
        # A second SIGTERM is often the same request passed on, and so is a launcher's SIGINT to its processes.
        if signum == signal.SIGINT and not _State.shared:
            raise KeyboardInterrupt
        return
    if _State.depth:
        _State.pending = signum
        if not _State.silent:
            again = b"" if _State.shared else b"; Ctrl-C again gives that up"
            with suppress(OSError):  # the terminal may be what is gone
                os.write(2, b"\nstopping as soon as what is under way is whole" + again + b"\n")
        return
    _State.stopping = True
    raise Interrupted(signum)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def handled() -> Iterator[None]:
    """Turn signals into `Interrupted` inside the block. Inside another such block, that one does it.

    SIGHUP, of a terminal that closes, is left to who ignores it, such as `nohup`.
    """
    if not _in_main_thread() or signal.getsignal(signal.SIGINT) is _handle:
        yield
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)  # which Windows lacks
    if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
        numbers.append(hangup)
    before = {number: signal.signal(number, _handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _State.depth, _State.asked, _State.pending, _State.stopping = 0, None, None, False


@contextmanager
def shared(silent: bool) -> Iterator[None]:
    """Hold signals back inside the block, in one of several processes; a `silent` one says nothing about it."""
    _State.shared, _State.silent = True, silent
    try:
        with deferred():
            yield
    finally:
        _State.shared = _State.silent = False


@contextmanager
def let_through() -> Iterator[None]:
    """Inside `deferred()`: let signals end the block at once, one that waits already too."""
    depth, _State.depth = _State.depth, 0
    try:
        if _State.pending is not None:
            stop(_State.pending)
        yield
    finally:
        _State.depth = depth


def stop(signum: int) -> None:
    """Stop as if this process had got the signal."""
    _State.pending, _State.stopping = None, True
    raise Interrupted(signum)


def check() -> None:
    """Stop if a signal has come and work goes on all the same.

    An error of a deferred block goes before a signal that waits, and may be dealt with; and somebody else's code may
    catch whatever is raised in it.
    """
    if _State.asked is not None and _State.depth == 0 and _in_main_thread():
        stop(_State.asked)


def waits() -> bool:
    """Return whether a signal waits for the end of a `deferred()` block, which may then leave out what can wait."""
    return _State.pending is not None


def request(signum: int) -> None:
    """Let the main thread stop as if it had got the signal, without a word; for other threads."""
    _State.silent = True
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signum)


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
        stop(_State.pending)
