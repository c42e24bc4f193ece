"""One case: begin, be struck, go on until the work is done, compare."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.torture import history, processes, works
from benchmarks.torture.moments import Disk, Watch
from benchmarks.torture.points import POINTS, Point
from benchmarks.torture.records import Record
from grpo_mlflow.training import throughput

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
_ENDED = (0, 128 + signal.SIGTERM, 128 + signal.SIGINT)  # of processes that can give their runs a status
_LONG = 1200.0  # seconds that the longest work may take
_TRIES = 3  # times that the work is gone on with: the first may say that there is nothing to go on with


@dataclass(frozen=True, slots=True)
class Measured:
    """An undisturbed work: what it leaves, and how many moments it has at each point."""

    history: dict[str, Any]
    moments: dict[str, int]
    seconds: float


class Cases:
    """Makes cases in a folder.

    Args:
        address: of the server of artifacts.
        seed: of all that is drawn.
    """

    def __init__(self, folder: Path, address: str, seed: int) -> None:
        self.folder, self.address, self.seed = folder, address, seed
        self._measured: dict[tuple[str, bool], Measured] = {}

    def warm(self, kinds: Sequence[str]) -> None:
        """Import in this process whatever such work needs."""
        for work in kinds:
            folder = Path(tempfile.mkdtemp(prefix="warm-", dir=self.folder)) / "c-0-0"
            processes.wait(processes.fork(self.folder, "make.log", partial(self._new, folder, work)))
            processes.warm(folder, partial(works.begin, work))
        throughput.gemm_peak(torch.device("cpu"), torch.float32)  # measured once per process

    def run(self, number: int, point: Point) -> Record:
        """Run case `number`; its folder stays where something is wrong."""
        draws, began = random.Random(f"{self.seed}/{number}"), time.monotonic()
        number_of_signal = draws.choice(SIGNALS)
        sent = point.disk or number_of_signal.name
        record, folder = Record(number, self.seed, point.name, sent), self._make(point, draws, f"c{number:06d}")
        killed = self._struck_at_random(folder, point, draws, record) if point.resumed else 0
        self._strike(folder, point, draws, number_of_signal, record)
        ended = record.codes[-1]
        own = self._check_end(folder, record, killed)
        if ended == 0 or draws.random() < 0.5:
            self._send(folder, record)
            runs = self._statuses(folder, killed)
            left = [name for run_id, name, status in runs if run_id in own and status == "RUNNING"]
            record.wrong += [f"after upload: {name} is RUNNING" for name in left]
        if ended != 0:
            self._go_on(folder, point, record)
        found = processes.answer(folder, lambda: history.read(folder, self.address))
        record.said = processes.errors(folder)
        record.wrong += found["wrong"] + processes.mistakes(record.said)
        expected = self.measured(point.work, resumed=False).history
        for part in ("runs", "study"):
            record.differences += history.differences(expected[part], found[part], part)
        record.seconds = round(time.monotonic() - began, 2)
        if not (record.differences or record.wrong):
            shutil.rmtree(folder)
        return record

    def measured(self, work: str, *, resumed: bool) -> Measured:
        """Return what the work leaves undisturbed; `resumed`: with its moments after a kill halfway."""
        key = (work, resumed)
        if key not in self._measured:
            folder = Path(tempfile.mkdtemp(prefix=f"whole-{work}-", dir=self.folder)) / "c-0-0"
            processes.wait(processes.fork(self.folder, "make.log", partial(self._new, folder, work)))
            if resumed:
                half = self.measured(work, resumed=False).seconds * 0.6
                processes.wait(processes.fork(folder, "1.log", lambda: works.begin(work)), (half, signal.SIGKILL))
            regions = {p.name: p.region for p in POINTS if p.work == work and p.resumed == resumed and p.region}
            watch = Watch(regions, lambda name, moment: None)
            seconds = self._timed(folder, work) if not resumed else 0.0
            began = time.monotonic()
            moments = dict[str, int]()
            if work != "slow":
                moments = self._counted(folder if resumed else self._twin(folder, work), work, resumed, watch)
            seconds = seconds or time.monotonic() - began
            left = processes.answer(folder, lambda: history.read(folder, self.address))
            if left["wrong"]:
                raise RuntimeError(f"an undisturbed {work} is not as it should be: {left['wrong']}")
            self._measured[key] = Measured(left, moments, seconds)
        return self._measured[key]

    def _timed(self, folder: Path, work: str) -> float:
        began = time.monotonic()
        if code := processes.wait(processes.fork(folder, "1.log", lambda: works.begin(work)), hangs=_LONG):
            raise RuntimeError(f"{folder}/1.log: an undisturbed {work} ended with {code}")
        return time.monotonic() - began

    def _twin(self, folder: Path, work: str) -> Path:
        """Return a further folder for the same work: one is timed and compared, in the other moments are counted."""
        twin = folder.parent / "c-3-2" if work == "spool" else folder.parent / "c-1-0"
        processes.wait(processes.fork(self.folder, "make.log", partial(self._new, twin, work)))
        return twin

    def _counted(self, folder: Path, work: str, resumed: bool, watch: Watch) -> dict[str, int]:
        disk = Disk(folder)

        def count() -> dict[str, int]:
            disk.start()
            watch.start()
            try:
                (works.go_on if resumed else works.begin)(work)
            except SystemExit as end:
                if end.code:
                    raise
            return {**watch.moments, "files": disk.opened}

        found: dict[str, int] = processes.answer(folder, count)
        return found

    def _new(self, folder: Path, work: str) -> None:
        works.make(folder, self.folder, work, self.address)

    def _make(self, point: Point, draws: random.Random, name: str) -> Path:
        self.measured(point.work, resumed=False)  # before the case, as it takes longer
        first, count = (draws.randint(1, 12), draws.randint(1, 3)) if point.work == "spool" else (0, 0)
        return self.new(f"{name}-{first}-{count}", point.work)

    def new(self, name: str, work: str) -> Path:
        """Return the folder of a new case."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        processes.wait(processes.fork(self.folder, "make.log", partial(self._new, folder, work)))
        return folder

    def _struck_at_random(self, folder: Path, point: Point, draws: random.Random, record: Record) -> int:
        """Kill the work after a random time, and return the process."""
        share = (0.1, 0.5) if point.work == "study" else (0.3, 0.95)  # of a study, while trials run
        seconds = self.measured(point.work, resumed=False).seconds * draws.uniform(*share)
        pid = processes.fork(folder, "0.log", lambda: works.begin(point.work))
        record.codes.append(processes.wait(pid, (seconds, signal.SIGKILL)))
        return pid

    def _strike(self, folder: Path, point: Point, draws: random.Random, number: int, record: Record) -> None:
        act = works.go_on if point.resumed else works.begin
        measured, after = self.measured(point.work, resumed=point.resumed), None
        mark, watch = folder / "struck.log", None
        if point.disk:
            start = draws.randint(1, measured.moments["files"])
            watch = Disk(folder, start, limited=point.disk == "limited", mark=mark)
        elif point.region is not None:
            moment = draws.randint(1, max(1, measured.moments[point.name]))
            watch = Watch({point.name: point.region}, _strike_at(moment, number, mark))
        else:
            after = (measured.seconds * draws.random(), number)

        def struck() -> None:
            if watch is not None:
                watch.start()
            act(point.work)

        code = processes.wait(processes.fork(folder, "1.log", struck), after)
        record.codes.append(code)
        record.struck = mark.exists() or code != 0

    def _check_end(self, folder: Path, record: Record, killed: int) -> set[str]:
        """Look at how the process that was struck has ended; return the runs that it had, if it could end them.

        Nobody ends in a traceback, or not at all. Who ends other than by SIGKILL gives each of its runs a status, in
        the store or behind what waits for it, and says what sends that.
        """
        if record.codes[-1] == processes.TRACEBACK:
            record.wrong.append("ended in a traceback")
        if record.codes[-1] == -signal.SIGALRM:
            record.wrong.append("hung")
        if record.codes[-1] not in _ENDED:
            return set()
        waiting, runs = _waiting(folder), self._statuses(folder, killed)
        for run_id, name, status in runs:
            if status == "RUNNING" and not waiting.get(run_id):
                record.wrong.append(f"ended with {record.codes[-1]}: {name} is left RUNNING")
        left = any(run_id in waiting for run_id, _, _ in runs)
        if left and "grpo upload" not in (folder / "1.log").read_text():
            record.wrong.append(f"ended with {record.codes[-1]} without a word on what sends the rest")
        return {run_id for run_id, _, _ in runs}

    def _statuses(self, folder: Path, killed: int) -> list[tuple[str, str, str]]:
        found: list[tuple[str, str, str]] = processes.answer(folder, partial(history.statuses, killed))
        return found

    def _send(self, folder: Path, record: Record) -> None:
        """Send what waits for the store."""
        for number in range(_TRIES):
            if not any(folder.rglob("spool.jsonl")):
                return
            record.codes.append(processes.wait(processes.fork(folder, f"upload-{number}.log", _upload)))
            if record.codes[-1] not in (0, 1):  # 1: the store is away again
                record.wrong.append(f"upload ended with {record.codes[-1]}")

    def _go_on(self, folder: Path, point: Point, record: Record) -> None:
        for number in range(2, 2 + _TRIES):
            code = processes.wait(processes.fork(folder, f"{number}.log", lambda: works.go_on(point.work)))
            record.codes.append(code)
            if code == 0:
                self._send(folder, record)  # the store was away again: it said what sends the rest
                return
            if code in (processes.TRACEBACK, -signal.SIGALRM):
                record.wrong.append(f"going on ended with {code}")
        record.wrong.append("it could not be gone on with")


def _waiting(folder: Path) -> dict[str, bool]:
    """Return of each run, by its id, that has kept something whether its last status is among that."""
    found = {}
    for path in folder.rglob("spool.jsonl"):
        home = path.parent.parent if path.parent.name == "artifacts" else path.parent
        found[home.name] = any(line.startswith('["status"') for line in path.read_text().splitlines())
    return found


def _upload() -> None:
    works.send(works.STORE)


def _strike_at(moment: int, number: int, mark: Path) -> Callable[[str, int], None]:
    def reached(name: str, passed: int) -> None:
        if passed == moment:
            os.close(os.open(mark, os.O_CREAT | os.O_WRONLY))
            os.kill(os.getpid(), number)

    return reached
