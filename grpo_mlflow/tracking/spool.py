"""Operations that wait on the disk for a store that is away."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from grpo_mlflow.runtime.files import replacing, write_whole
from grpo_mlflow.tracking.operation import Operation
from grpo_mlflow.tracking.operations import Unknown, from_list

_BLOCK = 1 << 16  # bytes that are read at once from the end


class Spool:
    """A file of one JSON list per operation, in order.

    What a full disk or a kill cut off in the middle of a line never became one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start = 0  # of the first that waits: above 0 where a full disk kept those before it in the file
        self._whole: int | None = None  # the size of the file, if it is known to end with a whole line

    def waits(self) -> bool:
        return self.path.exists()

    def end(self) -> int:
        """Return where the last whole line ends: what is before does not change until it is dropped."""
        if not self.waits():
            return 0
        with self.path.open("rb") as stream:
            place = stream.seek(0, os.SEEK_END)
            while place > self._start:
                first = max(self._start, place - _BLOCK)
                stream.seek(first)
                if (found := stream.read(place - first).rfind(b"\n")) >= 0:
                    return first + found + 1
                place = first
        return self._start

    def waiting(self, end: int) -> Iterator[Operation]:
        """Yield the operations that wait, up to `end`."""
        if not self.waits():
            return
        with self.path.open("rb") as stream:
            place = stream.seek(self._start)
            while place < end:
                line = stream.readline()
                place += len(line)
                yield _read(line)

    def keep_only(self, wanted: Callable[[Operation], bool]) -> None:
        """Forget the operations that are not wanted."""
        text = "".join(f"{json.dumps(each.as_list())}\n" for each in self.waiting(self.end()) if wanted(each))
        if not text:
            self.path.unlink(missing_ok=True)
        else:
            write_whole(self.path, text, synced=True)
        self._start, self._whole = 0, None

    def append(self, operation: Operation) -> None:
        """Add an operation; the system has it when this returns, so that no kill loses it."""
        with self.path.open("ab") as stream:
            if stream.tell() != self._whole:
                stream.truncate(self.end())
            stream.write(json.dumps(operation.as_list()).encode() + b"\n")
            stream.flush()
            self._whole = stream.tell()

    def sync(self) -> None:
        """Wait until the disk has all that waits."""
        if self.waits():
            with self.path.open("rb") as stream:
                os.fsync(stream.fileno())

    def drop(self, count: int) -> None:
        """Forget the first operations, so that no other process sends them again."""
        if not self.waits():
            return
        with self.path.open("rb") as stream:
            stream.seek(self._start)
            for _ in range(count):
                stream.readline()
            self._start = stream.tell()
            if not stream.readline().endswith(b"\n"):
                self.path.unlink()
                self._start, self._whole = 0, None
            elif count:
                stream.seek(self._start)
                self._keep_rest(stream)

    def _keep_rest(self, stream: BinaryIO) -> None:
        try:
            with replacing(self.path, synced=True) as rest:
                shutil.copyfileobj(stream, rest)
        except OSError:  # a full disk: they stay in the file
            return
        self._start, self._whole = 0, None


def _read(line: bytes) -> Operation:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):  # damaged: what cannot be sent is set aside, and the others are
        content = None
    is_one = isinstance(content, list) and content and isinstance(content[0], str)
    return from_list(content) if is_one else Unknown([line.decode(errors="replace")])
