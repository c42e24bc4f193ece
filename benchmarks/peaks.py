"""The peak of this process's own memory while something runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

# glibc keeps what is freed, which makes peaks of later phases invisible; set before Python starts
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
MB = 2**20


def held() -> float:
    """Return this process's own memory in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("RssAnon"))) / 1024


class Peaks:
    """The highest memory of each phase over that at its begin, and what it left."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[float, float]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what the block takes."""
        if dist.is_initialized():
            dist.barrier()
        start = most = held()
        over = threading.Event()

        def watch() -> None:
            nonlocal most
            while not over.is_set():
                most = max(most, held())
                time.sleep(0.001)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()
        self.found[name] = most - start, held() - start
