"""Files that are whole or as they were: a process that is killed while it writes leaves none that is cut off."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path, *, synced: bool = False) -> Iterator[BinaryIO]:
    """Write a file beside `path`, in a folder that is made if need be, which takes its place when the block ends.

    A `synced` one also outlives a machine that loses its power; that costs a wait for the disk.

    Raises:
        OSError: it cannot be written; what stood there before still does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex[:8]}.part")  # several may write the same file
    try:
        with beside.open("wb") as stream:
            yield stream
            if synced:
                stream.flush()
                os.fsync(stream.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    if synced:
        _sync_names(path.parent)


def write_whole(path: Path, content: str, *, synced: bool = False) -> None:
    """Write a text as `replacing` does."""
    with replacing(path, synced=synced) as stream:
        stream.write(content.encode())


def _sync_names(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError:  # a file system that knows no such thing for folders
        pass
    finally:
        os.close(number)
