"""A real MLflow server that can be ended and started again."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path


class Server:
    """An MLflow server in a process of its own, at an address of this machine."""

    def __init__(self, folder: Path, address: str = "127.0.0.1") -> None:
        with socket.socket() as probe:
            probe.bind((address, 0))
            self.port = probe.getsockname()[1]
        self.uri, self._folder, self._address = f"http://{address}:{self.port}", folder, address
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", self._address, "--port", str(self.port)),
            *("--allowed-hosts", f"{self._address}:*"),
            *("--backend-store-uri", f"sqlite:///{self._folder}/server.db", "--workers", "1"),
            *("--artifacts-destination", str(self._folder / "artifacts")),
        ]
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=1) as answer:
                    answer.read()
                return
            except OSError:
                time.sleep(0.1)
        raise AssertionError((self._folder / "server.log").read_text())

    def stop(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, 9)
            self._process.wait()
            self._process = None
