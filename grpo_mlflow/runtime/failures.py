"""What the machine does to a run, told in one line, and what becomes of a mistake of our own: its traceback is kept."""

from __future__ import annotations

import errno
import os
import traceback
from pathlib import Path

from grpo_mlflow.errors import UserError, one_line, redact

LOG = "error.log"
_PLACE = "_grpo_error_log"
_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EFBIG: "a file may not get that large here (`ulimit -f` shows the limit)",
    errno.EIO: "the disk fails",
    errno.ESTALE: "the network file system has lost a file",
    errno.EROFS: "the file system can only be read",
    errno.EACCES: "a file may not be used",
    errno.EMFILE: "too many files are open (`ulimit -n` shows the limit)",
    errno.ENOMEM: "the memory is used up",
}
_MEMORY = ("MemoryError", "OutOfMemoryError")  # the second is that of torch, which is not imported for this


def told(error: BaseException) -> UserError | None:
    """Return what the machine did as an error of ours; None where it is a mistake of the program.

    Libraries that write files themselves give the system's words in errors of their own.
    """
    if isinstance(error, UserError):
        return error
    if type(error).__name__ in _MEMORY:
        return UserError(f"the memory is used up: {one_line(error) or type(error).__name__}")
    number, text = getattr(error, "errno", None), str(error)
    for known, what in _DISK.items():
        if number == known or os.strerror(known) in text:
            return UserError(f"{what}: {one_line(error)}")
    return UserError(f"a file or an address cannot be used: {one_line(error)}") if isinstance(error, OSError) else None


def log(error: BaseException) -> str:
    """Return the traceback of a mistake of our own, without passwords."""
    return redact("".join(traceback.format_exception(error)))


def note(error: BaseException, path: Path) -> None:
    """Remember where the traceback of an error is kept."""
    setattr(error, _PLACE, path)


def kept(error: BaseException) -> Path:
    """Return where the traceback of an error is; the current folder gets it where no run has it.

    Raises:
        OSError: it cannot be written there.
    """
    found: Path | None = getattr(error, _PLACE, None)
    if found is None:
        found = Path(LOG).absolute()
        found.write_text(log(error), errors="backslashreplace")
    return found
