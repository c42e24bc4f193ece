"""MLflow is away: its database locked, its server hung for a while, or ended and started again."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.torture import history, processes, works
from benchmarks.torture.cases import Cases
from benchmarks.torture.moments import Region, Watch
from benchmarks.torture.records import Record
from grpo_mlflow.search.trials import Search
from grpo_mlflow.tracking.tracker import MlflowTracker

_LOCKED, _HUNG, _STARTS = 8.0, 14.0, 120.0  # seconds: more than the store's own patience; until a server answers


@dataclass(frozen=True, slots=True)
class Outage:
    """An accident of the store while it is written to.

    Args:
        work: `run` or `study`.
        kind: `locked` (the file, without a server), `hung` or `ended` (the server).
        region: what the process is at when it happens.
        then: what is done when the store is back: `upload`, or `go on`.
    """

    name: str
    work: str
    kind: str
    region: Region
    then: str


_WRITES = Region([MlflowTracker.flush, MlflowTracker.tags, MlflowTracker.table])
OUTAGES = (
    Outage("outage: file locked", "run", "locked", _WRITES, "upload"),
    Outage("outage: server hung", "run", "hung", _WRITES, "upload"),
    Outage("outage: server ended, upload", "run", "ended", _WRITES, "upload"),
    Outage("outage: server ended, resume", "run", "ended", _WRITES, "go on"),
    Outage("outage: at a trial's end", "study", "ended", Region([MlflowTracker.finish, Search._tell]), "go on"),
)


class Server:
    """A real MLflow server on loopback, on the database of a case, with its artifacts beside it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and return when it answers."""
        words = ["--host", "127.0.0.1", "--port", str(self._port), "--workers", "1"]
        words += ["--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db"]
        words += ["--artifacts-destination", str(self._folder / "served")]
        with (self._folder / "server.log").open("ab") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *words],
                stdout=said,
                stderr=said,
                cwd=self._folder,
                start_new_session=True,
            )
        end = time.monotonic() + _STARTS
        while time.monotonic() < end:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=1):
                    return
            except OSError:
                time.sleep(0.2)
        raise RuntimeError(f"{self._folder}/server.log: no MLflow server after {_STARTS} seconds")

    def send(self, number: int) -> None:
        """Send a signal to it and to its own processes."""
        assert self._process is not None, "it was started"
        os.killpg(self._process.pid, number)

    def end(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.send(signal.SIGKILL)
            self._process.wait()


def run(cases: Cases, number: int, outage: Outage) -> Record:
    """Let an outage happen once, send or do what is left, and compare; the folder stays where something is wrong."""
    expected, began = cases.measured(outage.work, resumed=False), time.monotonic()
    draws = random.Random(f"{cases.seed}/{number}")
    record = Record(number, cases.seed, outage.name, outage.kind)
    folder = cases.new(f"o{number:06d}-0-0", outage.work)
    server = Server(folder)
    uri = "sqlite:///mlflow.db" if outage.kind == "locked" else server.url
    try:
        if outage.kind != "locked":
            server.start()
        _meet(folder, outage, draws, server, uri, record)
        _after(folder, outage, uri, record)
    finally:
        server.end()
    found = processes.answer(folder, lambda: history.read(folder, cases.address))
    record.wrong += found["wrong"]
    for part in ("runs", "study"):
        record.differences += history.differences(expected.history[part], found[part], part)
    record.seconds = round(time.monotonic() - began, 2)
    if not (record.wrong or record.differences):
        shutil.rmtree(folder)
    return record


def _meet(folder: Path, outage: Outage, draws: random.Random, server: Server, uri: str, record: Record) -> None:
    """Begin the work, let the store go away at a moment of it, and bring it back when the process has ended."""
    mark, moment = folder / "struck.log", draws.randint(1, 20_000)

    def reached(name: str, passed: int) -> None:
        if passed == moment:
            mark.touch()
            _take_away(folder, outage.kind, server)

    def struck() -> None:
        Watch({outage.name: outage.region}, reached).start()
        works.begin(outage.work, uri)

    pid = processes.fork(folder, "1.log", struck)
    if outage.kind == "hung":
        _until(mark.exists)
        time.sleep(_HUNG)
        server.send(signal.SIGCONT)
    record.codes.append(processes.wait(pid))
    record.struck = mark.exists()
    if outage.kind == "ended":
        server.end()
        server.start()


def _take_away(folder: Path, kind: str, server: Server) -> None:
    if kind == "locked":
        processes.fork(folder, "lock.log", partial(_lock, folder / "mlflow.db"))
        _until((folder / "locked.log").exists)
    else:
        server.send(signal.SIGSTOP if kind == "hung" else signal.SIGKILL)


def _lock(database: Path) -> None:
    sys.settrace(None)
    with sqlite3.connect(database, timeout=_STARTS, isolation_level=None) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        database.with_name("locked.log").touch()
        time.sleep(_LOCKED)


def _after(folder: Path, outage: Outage, uri: str, record: Record) -> None:
    """Send what was kept, or do the rest of the work."""
    if outage.then == "upload" and record.codes[-1] == 0:
        act: Callable[[], None] = partial(works.send, uri)
    elif record.codes[-1] != 0 or outage.then == "go on":
        act = partial(works.go_on, outage.work, uri)
    code = processes.wait(processes.fork(folder, "2.log", act))
    record.codes.append(code)
    if code:
        record.wrong.append(f"what was left ended with {code}")
    if processes.TRACEBACK in record.codes:
        record.wrong.append("ended in a traceback")


def _until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + _STARTS
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
