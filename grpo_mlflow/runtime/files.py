"""Files that are whole or as they were, and folders to make something in: what a killed process leaves of them is
removed by the next one.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_NEW = 60.0  # seconds that a folder may take to be locked


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


def cache_root() -> Path:
    """Return the folder of what runs share: GRPO_MLFLOW_CACHE, else the user's cache directory."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "grpo_mlflow"
    return Path(os.environ.get("GRPO_MLFLOW_CACHE", default))


def write_whole(path: Path, content: str, *, synced: bool = False) -> None:
    """Write a text as `replacing` does."""
    with replacing(path, synced=synced) as stream:
        stream.write(content.encode())


def remove_parts(folder: Path) -> None:
    """Remove what killed processes left of files in a folder that nobody else writes to."""
    for path in folder.rglob(".*.part"):
        path.unlink(missing_ok=True)


def lock(number: int, *, waits: bool) -> None:
    """Lock an open file or folder until it is closed or the process ends, for processes that do the same.

    Raises:
        OSError: somebody else has it and we do not wait, or there are no locks here.
    """
    if fcntl is None:
        raise OSError(errno.ENOTSUP, "this system has no such locks")
    fcntl.flock(number, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def scratch(prefix: str, parent: Path) -> Iterator[Path]:
    """Make a folder inside `parent` to make something in; remove it in the end, unless it was renamed.

    Those of the same prefix whose process was killed are removed first. A lock tells them from those in use, as it ends
    with its process; where a file system has no locks, they stay.
    """
    for path in parent.glob(f"{prefix}*"):
        _remove_deserted(path)
    made = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    number = os.open(made, os.O_RDONLY)
    try:
        with suppress(OSError):
            lock(number, waits=False)
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        os.close(number)


def _remove_deserted(path: Path) -> None:
    with suppress(OSError):  # another process was faster, or it is in use
        if time.time() - path.stat().st_mtime < _NEW:
            return
        number = os.open(path, os.O_RDONLY)
        try:
            lock(number, waits=False)
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(number)


def _sync_names(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError:  # a file system that knows no such thing for folders
        pass
    finally:
        os.close(number)
