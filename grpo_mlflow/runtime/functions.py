"""Functions of the user's own in a process of their own, which the run outlives: a hang, an exit, a crash."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_TRIES = 3  # of a call that takes too long
_IMPORT_SECONDS = 600.0  # that the import of a module may take
_PROGRAM = Path(__file__).with_name("worker.py")
_START = "import sys, runpy; runpy.run_path(sys.argv.pop(), run_name='__main__')"


class FunctionFailed(Exception):
    """A function gave nothing that can be used: `name`, what it did, for which sample (None: unknown), and where."""

    def __init__(self, name: str, what: str, place: int | None = None, line: str | None = None) -> None:
        super().__init__(what)
        self.name, self.what, self.place, self.line = name, what, place, line


class NotLoaded(Exception):
    """The module or one of its functions cannot be used: one line says why."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What functions are called with: `keywords` for all samples, the fields of `trainer_state`, seconds for each."""

    keywords: Mapping[str, Any]
    state: Mapping[str, Any]
    timeout: float


@dataclass(frozen=True, slots=True)
class Given:
    """What the functions gave for a batch, by name, and what they logged."""

    values: Mapping[str, list[float | None]]
    metrics: Sequence[tuple[str, float]]


@dataclass(slots=True)
class _Child:
    """The process, while there is one."""

    process: subprocess.Popen[bytes] | None = None
    connection: Connection | None = None
    jobs: queue.SimpleQueue[tuple[Batch, Future[Given]] | None] = field(default_factory=queue.SimpleQueue)

    def end(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # what it has started as well
            process.wait()
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def close(self) -> None:
        self.jobs.put(None)
        self.end()


class Functions:
    """Functions of one module (its name, or the path of its file), by the names of their rewards.

    Args:
        names: the name of a function for each reward.
        options: keyword arguments of each that has some.
        each: whether they are called for one sample at a time, each with its own time limit.

    Raises:
        NotLoaded: the module cannot be imported, or lacks one of them.
    """

    def __init__(
        self, module: str, names: Mapping[str, str], options: Mapping[str, Mapping[str, Any]], *, each: bool = False
    ) -> None:
        self._first = {"module": module, "names": dict(names), "options": dict(options), "path": _path(), "each": each}
        self._child = _Child()
        self._end = weakref.finalize(self, self._child.close)
        self.lines = _start(self._child, self._first)
        names_ = tuple(names)
        threading.Thread(target=_work, args=(self._child, self._first, names_, self.lines), daemon=True).start()

    def begin(self, batch: Batch) -> Future[Given]:
        """Begin to call all functions for a batch; the future may raise FunctionFailed."""
        future: Future[Given] = Future()
        self._child.jobs.put((batch, future))
        return future


_known: deque[tuple[object, Functions]] = deque(maxlen=4)


def functions(
    module: str, names: Mapping[str, str], options: Mapping[str, Mapping[str, Any]], *, each: bool = False
) -> Functions:
    """Return the functions, in the process that has them already where nothing has changed since it was started."""
    stamp = None
    with suppress(OSError):
        stamp = Path(module).expanduser().stat().st_mtime_ns
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}  # not theirs
    key = (module, dict(names), dict(options), each, _path(), stamp, environment)
    for known, found in _known:
        if known == key:
            return found
    made = Functions(module, names, options, each=each)
    _known.append((key, made))
    return made


def _path() -> list[str]:
    """Return where modules are looked for: a console script has its own folder there instead of the current one."""
    return [os.getcwd(), *(entry for entry in sys.path if entry not in ("", os.getcwd()))]


def _start(child: _Child, first: Mapping[str, Any]) -> dict[str, str]:
    """Start the process and return in which file and line each function begins; raise NotLoaded."""
    own, other = Pipe()
    child.process = subprocess.Popen(
        [sys.executable, "-c", _START, str(other.fileno()), str(_PROGRAM)],
        pass_fds=(other.fileno(),),
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the run, which ends this process
    )
    other.close()
    child.connection = own
    own.send(first)
    if not own.poll(_IMPORT_SECONDS):
        child.end()
        raise NotLoaded(f"cannot be imported within {_IMPORT_SECONDS:g} s")
    try:
        answer = own.recv()
    except (EOFError, OSError):
        raise NotLoaded(f"cannot be imported: {_how(child)}") from None
    if "wrong" in answer:
        child.end()
        raise NotLoaded(f"{answer['wrong']}{_at(answer['line'])}")
    lines: dict[str, str] = answer["lines"]
    return lines


def _work(child: _Child, first: Mapping[str, Any], names: Sequence[str], lines: Mapping[str, str]) -> None:
    """Do the jobs of a child in order, until there is None."""
    while (job := child.jobs.get()) is not None:
        batch, future = job
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(_judged(child, first, names, lines, batch))
        except BaseException as error:
            future.set_exception(error)


def _judged(
    child: _Child, first: Mapping[str, Any], names: Sequence[str], lines: Mapping[str, str], batch: Batch
) -> Given:
    """Return what the functions give; a call that takes too long is made again, in a new process."""
    values: dict[str, list[float | None]] = {}
    metrics: list[tuple[str, float]] = []
    for left in reversed(range(_TRIES)):
        if child.process is None:
            try:
                _start(child, first)
            except NotLoaded as error:
                raise FunctionFailed(names[0], str(error)) from None
        assert child.connection is not None
        waiting = [name for name in names if name not in values]
        began, failing = waiting[0], None
        try:
            child.connection.send({"keywords": batch.keywords, "state": batch.state, "names": waiting})
            while waiting:
                if not child.connection.poll(batch.timeout):
                    if failing is not None:
                        raise failing
                    break
                answer = child.connection.recv()
                began = answer["name"]
                if "failing" in answer:
                    failing = _failure(began, answer["failing"], lines)
                if "wrong" in answer:
                    raise _failure(began, answer, lines)
                if "values" in answer:
                    values[began] = answer["values"]
                    metrics += answer["metrics"]
                    waiting.remove(began)
                    began = waiting[0] if waiting else began
        except (EOFError, OSError):
            raise FunctionFailed(began, f"ended its process: {_how(child)}", None, lines[began]) from None
        except FunctionFailed:
            child.end()  # its answers for the others may still be on their way
            raise
        if not waiting:
            return Given(values, metrics)
        child.end()
        if not left:
            what = f"does not end within {batch.timeout:g} s (data.reward_timeout), {_TRIES} times"
            raise FunctionFailed(began, what, None, lines[began])
    raise AssertionError("unreachable")


def _failure(name: str, answer: Mapping[str, Any], lines: Mapping[str, str]) -> FunctionFailed:
    return FunctionFailed(name, answer["wrong"], answer["place"], answer["line"] or lines[name])


def _how(child: _Child) -> str:
    """Return how a process ended that has closed its pipe."""
    process, until = child.process, time.monotonic() + 5.0
    while process is not None and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    code = process.returncode if process is not None else None
    child.end()
    if code is None:
        return "it closed its pipe"
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


def _at(line: str | None) -> str:
    return f" ({line})" if line else ""
