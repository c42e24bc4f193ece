"""Moments of a process to strike at: the n-th line, call or return inside a named part of the program.

No library is patched: Python's own tracing tells where the process is, and its audit events tell of files that are
opened for writing.
"""

from __future__ import annotations

import errno
import inspect
import os
import resource
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

Function = Callable[..., Any]
_LIMIT = 4096  # bytes that a file may have where the limit is on files, not on the disk


@dataclass(frozen=True, slots=True)
class Region:
    """What the functions `inside` do, whatever they call, but for what is done in those `outside`."""

    inside: Sequence[Function]
    outside: Sequence[Function] = ()


def _codes(functions: Sequence[Function]) -> frozenset[CodeType]:
    return frozenset(inspect.unwrap(function).__code__ for function in functions)


class _Watched(threading.local):
    """How deep each thread is in a region."""

    def __init__(self, name: str, region: Region) -> None:
        self.name, self.inside, self.outside = name, _codes(region.inside), _codes(region.outside)
        self.entered: FrameType | None = None
        self.muted: FrameType | None = None

    @property
    def active(self) -> bool:
        return self.entered is not None and self.muted is None

    def called(self, frame: FrameType) -> bool:
        """Return whether the region needs to hear of the rest of this call."""
        if self.entered is None and frame.f_code in self.inside:
            self.entered = frame
        elif self.active and frame.f_code in self.outside:
            self.muted = frame
            return True
        return self.active

    def returned(self, frame: FrameType) -> None:
        if frame is self.muted:
            self.muted = None
        elif frame is self.entered:
            self.entered = None


class _Active(threading.local):
    """The regions that each thread is in."""

    def __init__(self) -> None:
        self.regions: list[_Watched] = []


class Watch:
    """Counts the moments of each region in this thread and in those that it starts; `reached` is told of each."""

    def __init__(self, regions: Mapping[str, Region], reached: Callable[[str, int], None]) -> None:
        self._watched = [_Watched(name, region) for name, region in regions.items()]
        self._ends = frozenset().union(*(each.inside | each.outside for each in self._watched))
        self._active = _Active()
        self.moments = {each.name: 0 for each in self._watched}
        self._reached = reached

    def start(self) -> None:
        threading.settrace(self._trace)
        sys.settrace(self._trace)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code not in self._ends:
            return self._local if self._active.regions else None
        heard = [each.called(frame) for each in self._watched]
        self._active.regions = [each for each in self._watched if each.active]
        return self._local if any(heard) else None

    def _local(self, frame: FrameType, event: str, argument: Any) -> Any:
        for each in self._active.regions:
            self.moments[each.name] += 1
            self._reached(each.name, self.moments[each.name])
        if event == "return" and frame.f_code in self._ends:
            for each in self._watched:
                each.returned(frame)
            self._active.regions = [each for each in self._watched if each.active]
        return self._local


class Disk:
    """Counts the files that the process opens for writing below a folder; from number `full_from` on there is no room.

    `mark` is made when it is reached. Where `limited`, files may grow to 4 KB only, those of other libraries and of the
    store as well; else no further file can be opened for writing, which is how Python's own writing meets a full disk.
    """

    def __init__(self, folder: Path, full_from: int = 0, *, limited: bool = False, mark: Path | None = None) -> None:
        self._folder, self._full_from, self._limited, self._mark = f"{folder}/", full_from, limited, mark
        self.opened = 0

    def start(self) -> None:
        sys.addaudithook(self._heard)  # for the rest of the process: Python has no way back

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or not isinstance(arguments[0], str) or not arguments[0].startswith(self._folder):
            return
        if not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or arguments[0].endswith(".log"):
            return
        self.opened += 1
        if self._full_from and self.opened >= self._full_from:
            if self._mark is not None:
                self._mark.touch()  # its name ends in .log: it is not counted
            if not self._limited:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), arguments[0])
            resource.setrlimit(resource.RLIMIT_FSIZE, (_LIMIT, resource.RLIM_INFINITY))
