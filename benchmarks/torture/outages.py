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
from itertools import pairwise
from pathlib import Path

from benchmarks.torture import history, processes, works
from benchmarks.torture.cases import Cases
from benchmarks.torture.moments import Region, Watch
from benchmarks.torture.records import Record
from grpo_mlflow.search.trials import Search
from grpo_mlflow.tracking.tracker import MlflowTracker

_STARTS = 120.0  # seconds until a server answers
_AWAY = 60.0  # seconds of an outage
_LONG = 1200.0  # seconds that a process may take
_DONE = ("outputs/*/metrics", "mlruns/*/*/artifacts/metrics")  # where each iteration leaves a file


@dataclass(frozen=True, slots=True)
class Outage:
    """An accident of the store while it is written to.

    Args:
        work: `slow`, a run of two minutes, or `study`.
        kind: `locked` (the file, without a server), `hung` or `ended` (the server).
        when: the part of the run, from 0 to 1, before which it begins; of a study, a trial's end.
        returns: whether the store is back after a minute; else, when the process has ended.
        then: what is done when both are over: `upload`, or `go on`.
    """

    name: str
    work: str
    kind: str
    when: tuple[float, float] = (0.05, 0.25)
    returns: bool = True
    then: str = "upload"


OUTAGES = (
    Outage("outage: file locked for 60 s", "slow", "locked"),
    Outage("outage: server hung for 60 s", "slow", "hung"),
    Outage("outage: server ended for 60 s", "slow", "ended"),
    Outage("outage: server ended, second half, upload", "slow", "ended", (0.5, 0.5), returns=False),
    Outage("outage: server ended, second half, resume", "slow", "ended", (0.5, 0.5), returns=False, then="go on"),
    Outage("outage: server ended for 60 s at a trial's end", "study", "ended", then="go on"),
)
_TRIAL_END = Region([MlflowTracker.finish, Search._tell])


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
        if outage.work == "slow":
            record.figures["longest_gap"] = _longest_gap(folder)
        _after(folder, outage, uri, record)
    finally:
        server.end()
    found = processes.answer(folder, lambda: history.read(folder, cases.address))
    record.said = processes.errors(folder)
    record.wrong += found["wrong"] + processes.mistakes(record.said)
    for part in ("runs", "study"):
        record.differences += history.differences(expected.history[part], found[part], part)
    record.seconds = round(time.monotonic() - began, 2)
    if not (record.wrong or record.differences):
        shutil.rmtree(folder)
    return record


def _meet(folder: Path, outage: Outage, draws: random.Random, server: Server, uri: str, record: Record) -> None:
    """Begin the work, take the store away, and bring it back after a minute or when the process has ended."""
    mark = folder / "struck.log"
    if outage.work == "study":
        pid = processes.fork(folder, "1.log", partial(_until_trial_end, mark, draws.randint(1, 5000), uri))
        _until(mark.exists, _LONG)
    else:
        pid = processes.fork(folder, "1.log", partial(works.begin, outage.work, uri))
        number = int(draws.uniform(*outage.when) * works.SLOW_ITERATIONS)
        name = f"train_iter_{number:03d}.json"
        _until(lambda: any(path for place in _DONE for path in folder.glob(f"{place}/{name}")), _LONG)
        mark.touch()
    began = time.monotonic()
    back = _take_away(folder, outage.kind, server)
    if outage.returns:
        time.sleep(_AWAY)
        record.struck = processes.alive(pid)  # it lived to see the end of the outage, and wrote in it
        record.figures["seconds_away"] = round(time.monotonic() - began, 1)
        back()
    record.codes.append(processes.wait(pid, hangs=_LONG))
    if not outage.returns:
        record.struck = time.monotonic() - began >= _AWAY
        record.figures["seconds_away"] = round(time.monotonic() - began, 1)
        back()
    elif outage.work == "study":
        record.struck = mark.exists()  # a study may end while its store is away


def _until_trial_end(mark: Path, moment: int, uri: str) -> None:
    def reached(name: str, passed: int) -> None:
        if passed == moment:
            mark.touch()
            time.sleep(0.5)  # until the store is away

    Watch({"end": _TRIAL_END}, reached).start()
    works.begin("study", uri)


def _take_away(folder: Path, kind: str, server: Server) -> Callable[[], None]:
    """Take the store away, and return what brings it back."""
    if kind == "locked":
        lock = processes.fork(folder, "lock.log", partial(_lock, folder / "mlflow.db"))
        _until((folder / "locked.log").exists, _STARTS)
        return lambda: _unlock(lock)
    if kind == "hung":
        server.send(signal.SIGSTOP)
        return lambda: server.send(signal.SIGCONT)
    server.end()
    return server.start


def _lock(database: Path) -> None:
    with sqlite3.connect(database, timeout=_STARTS, isolation_level=None) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        database.with_name("locked.log").touch()
        time.sleep(_LONG)


def _unlock(lock: int) -> None:
    os.kill(lock, signal.SIGKILL)
    processes.wait(lock)


def _after(folder: Path, outage: Outage, uri: str, record: Record) -> None:
    """Send what was kept, or do the rest of the work."""
    if outage.then == "upload" and record.codes[-1] == 0:
        act: Callable[[], None] = partial(works.send, uri)
    elif record.codes[-1] != 0 or outage.then == "go on":
        act = partial(works.go_on, outage.work, uri)
    code = processes.wait(processes.fork(folder, "2.log", act), hangs=_LONG)
    record.codes.append(code)
    if code:
        record.wrong.append(f"what was left ended with {code}")
    if processes.TRACEBACK in record.codes:
        record.wrong.append("ended in a traceback")


def _until(true: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.1)


def _longest_gap(folder: Path) -> float:
    """Return the most seconds between two iterations of a run: one that waits for its store has a long one."""
    files = sorted(path for place in _DONE for path in folder.glob(f"{place}/train_iter_*.json"))
    times = [path.stat().st_mtime for path in files]
    return round(max((b - a for a, b in pairwise(times)), default=0.0), 2)
