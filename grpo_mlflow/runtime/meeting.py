"""Whether all processes are still there and not busy elsewhere: found out at the end of a run, without ever hanging."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch.distributed as dist

_SECONDS = 15.0


def all_come(rank: int, count: int, is_lost: Callable[[], bool]) -> bool:
    """Return whether all processes call this within some seconds, so that they can exchange something; once in a run.

    Asked of the launcher's store and not in a collective: what ends a run may have ended another process, or left it
    waiting for this one in a collective of another kind.
    """
    names = [f"grpo/end/{number}" for number in range(count)]
    until = time.monotonic() + _SECONDS
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(names[rank], "here")
        while not is_lost() and time.monotonic() < until:
            if store.check(names):
                return not is_lost()
            time.sleep(0.05)
    except RuntimeError:  # the store was in a process that is gone
        pass
    return False
