"""Processes forked from this warm one, which has everything imported: a kill costs a second, not ten."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

TRACEBACK = 70  # the exit code of a process that ended in a traceback
MISTAKE = "a mistake of the program"  # what a command says of an error that it did not expect
_WARMED = (
    *("grpo_mlflow", "mlflow", "transformers", "accelerate", "torch", "optuna", "sqlalchemy", "alembic"),
    *("scipy", "pandas", "numpy", "sqlite3", "requests", "urllib3", "http", "email", "netrc"),
    *("git", "gitdb", "smmap", "PIL"),
)
_WRITERS: dict[int, subprocess.Popen[bytes]] = {}  # of the logs of processes; each ends with its own
_LAST = 2.0  # seconds for the end of a log
_HANGS = 120.0


def fork(folder: Path, log: str, call: Callable[[], object]) -> int:
    """Call something in a forked process in that folder, its output in a log there; return its id."""
    out, into = os.pipe()  # a limit on files, or a full disk, is none on what is said
    with (folder / log).open("ab") as stream:
        writer = subprocess.Popen(["cat"], stdin=out, stdout=stream)
    os.close(out)
    if pid := os.fork():
        os.close(into)
        _WRITERS[pid] = writer
        return pid
    code = TRACEBACK
    try:
        os.dup2(into, 1)
        os.dup2(into, 2)
        os.close(into)
        os.chdir(folder)
        call()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for said in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # a full disk: what it said is lost, not how it ended
                said.flush()
        os._exit(code)


def wait(pid: int, strike: tuple[float, int] | None = None, hangs: float = _HANGS) -> int:
    """Wait for a process; return its exit code, or minus the signal that ended it, -SIGALRM if it hung.

    `strike` is a time in seconds after which it is sent a signal; after `hangs` seconds it is taken for hung.
    """
    began = time.monotonic()
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            _end_writer(pid)
            return os.waitstatus_to_exitcode(status)
        passed = time.monotonic() - began
        if strike and passed >= strike[0]:
            os.kill(pid, strike[1])
            strike = None
        if passed > hangs:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            _end_writer(pid)
            return -signal.SIGALRM
        time.sleep(0.005)


def _end_writer(pid: int) -> None:
    writer = _WRITERS.pop(pid)
    try:
        writer.wait(_LAST)
    except subprocess.TimeoutExpired:  # a process of the process has the log open, too
        writer.kill()
        writer.wait()


def alive(pid: int) -> bool:
    """Return whether a process that was forked here has not ended."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def errors(folder: Path) -> list[str]:
    """Return the errors that the processes of a case have ended with, in order."""
    logs = sorted(folder.glob("*.log"), key=lambda log: log.stat().st_mtime)
    lines = [line for log in logs for line in log.read_text(errors="replace").splitlines()]
    return [line for line in lines if line.startswith("error: ")]


def mistakes(said: Sequence[str]) -> list[str]:
    """Return those errors that nobody had expected."""
    return [line for line in said if MISTAKE in line]


def answer(folder: Path, call: Callable[[], Any]) -> Any:
    """Return what a call returns in a forked process, by way of JSON.

    Raises:
        RuntimeError: it raised; the text is in `answer.log` of the folder.
    """
    path = folder / "answer.json"
    code = wait(fork(folder, "answer.log", lambda: path.write_text(json.dumps(call()))))
    if code:
        raise RuntimeError(f"{folder / 'answer.log'}: ended with {code}")
    return json.loads(path.read_text())


def warm(folder: Path, call: Callable[[], object]) -> None:
    """Import here what a call has imported in a forked process, so that later ones need not."""

    def imported() -> list[str]:
        with suppress(SystemExit):
            call()
        return sorted(sys.modules)

    for name in answer(folder, imported):
        if name not in sys.modules and name.startswith(_WARMED):
            with suppress(Exception):  # a module that only its own package can import
                importlib.import_module(name)
