"""Further processes on this machine that join a study."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

_MAX_REPLACED = 10  # then something kills them all, and the leader goes on alone


class Workers:
    """Processes that share the cores and the GPUs of this machine with the leader.

    Args:
        count: how many, beside the leader.
        command: the words of the leader's command line.
    """

    def __init__(self, count: int, command: Sequence[str]) -> None:
        self._words = [sys.executable, "-m", "grpo_mlflow", "optimize", *command]
        self._environment = dict(os.environ)
        self._environment.pop("MLFLOW_RUN_ID", None)  # the parent's
        self._count, self._replaced = count, 0
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        self._devices = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
        self._processes: list[subprocess.Popen[bytes]] = []

    @contextmanager
    def running(self) -> Iterator[Workers]:
        """See `Launcher.running`."""
        if self._count:  # all processes share the cores, this one too
            threads = max(1, torch.get_num_threads() // (self._count + 1))
            torch.set_num_threads(threads)
            self._environment["OMP_NUM_THREADS"] = str(threads)
        try:
            self._processes = [self._start(place) for place in range(self._count)]
            yield self
        finally:
            for process in self._processes:
                if process.poll() is None:
                    process.terminate()
            for process in self._processes:
                process.wait()

    def look_after(self) -> None:
        """See `Launcher.look_after`: another one is started for each that a signal has ended."""
        for place, process in enumerate(self._processes):
            if (process.poll() or 0) < 0 and self._replaced < _MAX_REPLACED:
                self._replaced += 1
                self._processes[place] = self._start(place)

    def _start(self, place: int) -> subprocess.Popen[bytes]:
        environment = dict(self._environment)
        if len(self._devices) > 1:  # this process has the first GPU
            environment["CUDA_VISIBLE_DEVICES"] = self._devices[(place + 1) % len(self._devices)]
        return subprocess.Popen(self._words, env=environment)
