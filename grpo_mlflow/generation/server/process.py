"""The life of a server that a run starts itself: start, wait, watch, restart, end."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack, suppress
from http.client import HTTPException
from pathlib import Path

import psutil

from grpo_mlflow.config import ServerConfig
from grpo_mlflow.errors import ServerFailed, UserError, redact
from grpo_mlflow.generation.server.engine import SERVERSIDE
from grpo_mlflow.generation.server.launch import Launch

_NEWS_SECONDS = 15.0
_STOP_SECONDS = 20.0
_END_SECONDS = 1.0  # from the end of a server to that of its warden
_DEATH_SECONDS = 0.1  # from the loss of its connections to where it shows as dead
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy does not reach this machine's ports


class ServerProcess:
    """A server as a child of this process. It ends with this process, whatever happens (see `serverside/warden.py`).

    Args:
        start: returns the command for a model folder or hub id and a port.
        settings: port, interpreter and patience.
        log: the file that the server's output is appended to.
        say: takes lines about progress.
    """

    def __init__(
        self, start: Callable[[str | Path, int], Launch], settings: ServerConfig, log: Path, say: Callable[[str], None]
    ) -> None:
        self._launch, self._settings, self.log, self._say = start, settings, log, say
        self._port = settings.port or free_ports(1)[0]
        self.model: str | Path = ""
        self._child: subprocess.Popen[bytes] | None = None
        self._closed = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def alive(self) -> bool:
        return self._child is not None and self._child.poll() is None

    def start(self, model: str | Path) -> None:
        """Start with this model, in the place of what runs, and wait until it answers.

        Raises:
            UserError: there is no such interpreter.
            ServerFailed: it ended, or did not answer in time; the message holds the end of its log.
        """
        self._require_open()
        self.stop()
        self.model = model
        launched = self._launch(model, self._port)
        if shutil.which(launched.command[0]) is None:
            raise UserError(f"generation.server.python = {launched.command[0]!r}: no such program; {launched.install}")
        if self._answers():
            raise ServerFailed(
                f"{self.url} is in use by another program; allowed: generation.server.port=0 (a free one)"
            )
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._say(f"server: starts at {self.url}, log in {self.log}")
        command, environment = launched.private()
        with self.log.open("ab") as stream:
            self._child = subprocess.Popen(
                [sys.executable, str(SERVERSIDE / "warden.py"), *command],
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=stream,
                start_new_session=True,  # the Ctrl-C of a terminal is for the trainer, which then ends its server
            )
        self._await_health()

    def ended(self) -> str | None:
        """Return how it ended by itself, with the end of its log, or None where it runs."""
        child = self._child
        if child is None or not self._is_dying(child):
            return None
        try:
            code = child.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            return None
        return f"the server ended ({_how(code)}); the end of {self.log}:\n{self.tail()}"

    def _is_dying(self, warden: subprocess.Popen[bytes]) -> bool:
        """Return whether the server is dead, though its warden may not have seen it yet."""
        with suppress(psutil.NoSuchProcess):
            servers = psutil.Process(warden.pid).children()
            until = time.monotonic() + _DEATH_SECONDS
            while any(server.status() != psutil.STATUS_ZOMBIE for server in servers):
                if time.monotonic() >= until:
                    return False
                time.sleep(_DEATH_SECONDS / 10)
        return True

    def close(self) -> None:
        """End it for good; a start that is under way in another thread gives up."""
        self._closed.set()
        self.stop()

    def stop(self) -> None:
        """End it and all its processes."""
        child, self._child = self._child, None
        if child is None:
            return
        assert child.stdin is not None
        child.stdin.close()
        try:
            child.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        self._clean_log()

    def _clean_log(self) -> None:
        """Take known secrets out of the log of a server that has ended: servers log what they were started with."""
        with suppress(OSError):
            written = self.log.read_bytes().decode(errors="surrogateescape")
            if (clean := redact(written)) != written:
                self.log.write_bytes(clean.encode(errors="surrogateescape"))

    def _await_health(self) -> None:
        began = time.monotonic()
        news_at = began + _NEWS_SECONDS
        while not (self._healthy() and self.alive):
            spent = time.monotonic() - began
            if self._child is not None and (code := self._child.poll()) is not None:
                told = f"the server ended while it started ({_how(code)})"
                raise ServerFailed(f"{told}; the end of {self.log}:\n{self.tail()}")
            if spent > self._settings.start_seconds:
                self.stop()
                raise ServerFailed(
                    f"the server runs, but was not ready after {spent:.0f} s (generation.server.start_seconds = "
                    f"{self._settings.start_seconds:g}; it did not answer); the end of {self.log}:\n{self.tail()}"
                )
            if time.monotonic() >= news_at:
                news_at += _NEWS_SECONDS
                self._say(f"server: still starting ({spent:.0f} s): {self.tail(1)[:120]}")
            if self._closed.wait(0.25):
                self.stop()  # it may have begun after the end of all others
                self._require_open()
        self._say(f"server: ready after {time.monotonic() - began:.0f} s")

    def _require_open(self) -> None:
        if self._closed.is_set():
            raise ServerFailed("the server was stopped while it started")

    def _healthy(self) -> bool:
        try:
            with _DIRECT.open(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (OSError, HTTPException):
            return False

    def _answers(self) -> bool:
        with socket.socket() as probe:
            probe.settimeout(5)
            return probe.connect_ex(("127.0.0.1", self._port)) == 0

    def tail(self, lines: int = 8) -> str:
        """Return the last lines of the log."""
        try:
            with self.log.open("rb") as stream:
                stream.seek(max(0, stream.seek(0, os.SEEK_END) - 16_384))
                found = stream.read().decode(errors="replace").splitlines()
        except OSError:
            return ""
        return redact("\n".join(line for line in found[-lines:]))


def free_ports(count: int) -> list[int]:
    """Return different ports of this machine that nobody listens on."""
    with ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _how(code: int) -> str:
    """Return what an exit code of the warden says of its server: a signal is told as a shell does, 128 + n."""
    number = -code if code < 0 else code - 128
    try:
        return f"by signal {number}, {signal.Signals(number).name}"
    except ValueError:
        return f"exit code {code}"
