"""Real vLLM servers, from the CPU build in .venv-vllm, and a real model for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from grpo_mlflow.config import ServerConfig
from grpo_mlflow.generation.server.launch import Launch, launch
from grpo_mlflow.generation.server.process import ServerProcess
from tests.support.paths import ROOT

PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
SMOLLM2 = ROOT / ".models" / "smollm2"
NEEDS_VLLM = [
    pytest.mark.server,
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-vllm: make .venv-vllm/.installed"),
]
NEEDS_SMOLLM2 = [
    *NEEDS_VLLM,
    pytest.mark.skipif(not (SMOLLM2 / ".made").exists(), reason="no SmolLM2: make .models/smollm2/.made"),
]


def server_settings(*arguments: str) -> ServerConfig:
    """What a server of the run's own is started with."""
    words = ("--max-model-len", "512", *arguments)
    return ServerConfig(manage=True, python=str(PYTHON), device="cpu", arguments=words)


@contextmanager
def running(model: Path, dtype: str, log: Path, *arguments: str, lora_rank: int | None = None) -> Iterator[str]:
    """Start a server that no run owns, as a run would start it but for `arguments`; its address."""
    settings = server_settings(*arguments)

    def start(source: str | Path, port: int) -> Launch:
        return launch("vllm_server", settings, source, port, dtype, lora_rank)

    process = ServerProcess(start, settings, log, print)
    try:
        process.start(model)
        yield process.url
    finally:
        process.close()


def kill_server_once(reached: Callable[[], bool]) -> list[int]:
    """Kill the server that this process starts from now on as soon as `reached`; the list takes its id.

    Those that stand already are other tests'.
    """
    killed: list[int] = []
    others = {process.pid for process in psutil.Process().children(recursive=True)}

    def kill() -> None:
        while not killed:
            time.sleep(0.1)
            if reached():
                for process in psutil.Process().children(recursive=True):
                    if process.pid in others:
                        continue
                    if "api_server" in " ".join(process.cmdline()) and "warden.py" not in process.cmdline()[1]:
                        process.kill()
                        killed.append(process.pid)

    threading.Thread(target=kill, daemon=True).start()
    return killed
