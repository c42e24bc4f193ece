"""Processes of one run without a launcher: forked, so that torch and MLflow are imported once for all of them."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["grpo_mlflow.runs"])


@dataclass(frozen=True, slots=True)
class Ranks:
    """Started processes, and the file that each writes to."""

    processes: tuple[BaseProcess, ...]
    logs: tuple[Path, ...]

    def text(self, rank: int) -> str:
        return self.logs[rank].read_text() if self.logs[rank].exists() else ""

    def wait_for(self, text: str, rank: int = 0, seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while text not in self.text(rank):
            assert time.monotonic() < until, self.everything()
            assert self.processes[rank].is_alive(), self.everything()
            time.sleep(0.02)

    def end(self, seconds: float = 60) -> list[int | None]:
        """Wait for all and return their exit codes."""
        until = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        return codes

    def everything(self) -> str:
        return "\n".join(f"--- {rank}\n{self.text(rank)}" for rank in range(len(self.logs)))

    def errors(self) -> list[str]:
        return [line for line in self.everything().splitlines() if line.startswith("error:")]


def start(work: Callable[..., None], arguments: Sequence[Any], folder: Path, count: int = 2) -> Ranks:
    """Start `count` processes that call `work(*arguments)` with the environment that a launcher would set."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    logs = tuple(folder / f"rank{rank}-{port}.log" for rank in range(count))
    processes = []
    for rank, log in enumerate(logs):
        launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
        named = {name: str(value) for name, value in {**launched, "MASTER_PORT": port}.items()}
        environment = {**os.environ, **named, "OMP_NUM_THREADS": "1"}
        process = _CONTEXT.Process(target=_begin, args=(work, arguments, environment, log, folder))
        process.start()
        processes.append(process)
    return Ranks(tuple(processes), logs)


def _begin(
    work: Callable[..., None], arguments: Sequence[Any], environment: dict[str, str], log: Path, folder: Path
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    stream = log.open("w", buffering=1)
    for number in (1, 2):
        os.dup2(stream.fileno(), number)
    sys.stdout = sys.stderr = stream
    import torch

    torch.set_num_threads(1)
    work(*arguments)


def train(*words: str) -> None:
    """What `grpo train WORDS` does."""
    from grpo_mlflow.cli.command import run
    from grpo_mlflow.cli.train import main

    sys.argv = ["train", *words]
    run(main)


def evaluate(*words: str) -> None:
    """What `grpo evaluate WORDS` does."""
    from grpo_mlflow.cli.command import run
    from grpo_mlflow.cli.evaluate import main

    sys.argv = ["evaluate", *words]
    run(main)
