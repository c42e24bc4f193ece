"""Who works on something, and whether that process still lives.

A process of this machine lives if its id and start time are those of a running one. Of another machine only its signs
of life are known: time stamps that it renews, so the clocks of the machines should agree to within a minute.

Optuna's own heartbeat would not do: it beats only inside `study.optimize`, while trials are asked and told here; only
SQL storages have it, not a journal file; and it takes minutes to notice a death that is seen at once on one machine.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil

_BEAT = 20.0  # seconds between signs of life
_DEAD = 180.0  # seconds without one until a process of another machine is given up; shorter has failed live trials
_CLOCK = 30.0  # a start time is told from the clock, which may be set while the process runs
log = logging.getLogger(__name__)


def _machine() -> str:
    """Name the machine; containers that share a host name differ by their process namespace."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def me() -> dict[str, Any]:
    """Describe this process, now."""
    pid = os.getpid()
    return {"machine": _machine(), "pid": pid, "started": psutil.Process(pid).create_time(), "seen": time.time()}


def gone(owner: Mapping[str, Any]) -> bool:
    """Return whether the process that `me` described has ended."""
    if owner["machine"] != _machine():
        return bool(time.time() - owner["seen"] > _DEAD)
    try:
        process = psutil.Process(owner["pid"])
        return abs(process.create_time() - owner["started"]) > _CLOCK or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def elsewhere(owner: Mapping[str, Any]) -> bool:
    """Return whether the process that `me` described is of another machine, so that only its signs of life tell."""
    return bool(owner["machine"] != _machine())


def named(owner: Mapping[str, Any]) -> str:
    """Return the process that `me` described in words."""
    return f"process {owner['pid']} on {str(owner['machine']).partition(' ')[0]}"


def is_me(owner: Mapping[str, Any] | None) -> bool:
    """Return whether `me` described this process."""
    mine = me()
    return (
        owner is not None
        and (owner["machine"], owner["pid"]) == (mine["machine"], mine["pid"])
        and abs(owner["started"] - mine["started"]) <= _CLOCK
    )


class Life:
    """Lets `write` note what `me` says every 20 seconds until `end`."""

    def __init__(self, write: Callable[[dict[str, Any]], None], level: int = logging.WARNING) -> None:
        self._write, self._level = write, level
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def end(self, *, wait: bool) -> None:
        """Note nothing more; `wait` for what is being noted."""
        self._ended.set()
        if wait:
            self._thread.join()

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT):
            try:
                self._write(me())
            except Exception as error:  # a storage may be away for a while; what is under way goes on
                log.log(self._level, "sign of life not noted: %s", error)


@contextmanager
def showing_life(write: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Let `write` note what `me` says, now and again until the block ends."""
    write(me())
    life = Life(write)
    try:
        yield
    finally:
        life.end(wait=True)
