"""The C library's allocator, told to keep what is freed.

By default glibc returns freed blocks of megabytes to the system, which hands them back zeroed, page by page; an update
frees and takes such blocks all the time. Kept, they are there at once, and the peak of memory stays what it was.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # mallopt(3)
_MOST = 2**31 - 1


def keep_freed() -> None:
    """Keep freed memory in this process; where the C library is another one, nothing changes."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        mallopt(_TRIM_THRESHOLD, _MOST)
        mallopt(_MMAP_MAX, 0)
