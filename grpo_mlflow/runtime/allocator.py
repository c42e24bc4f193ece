"""The C library's allocator, told to keep what is freed.

glibc returns freed blocks to the system as soon as a few megabytes lie free at the end of its heap, and takes them anew
zeroed, page by page; an update frees and takes such blocks all the time. Blocks above 32 MB still go back at once, as
they do by default, so that the heap has no larger holes than it would have.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)


def keep_freed() -> None:
    """Keep up to a gigabyte of freed memory in this process; where the C library is another one, nothing changes."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        mallopt(_TRIM_THRESHOLD, 1 << 30)
        mallopt(_MMAP_THRESHOLD, 32 << 20)  # to set one of them stops glibc from adapting both
