"""Whole commands, each in a process that is forked from a warm one: importing the libraries takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from grpo_mlflow.cli.command import run

_SECONDS = 60.0
_WARM = ["tests.support.warm"]


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended: its exit code, and what it said."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines that say what went wrong."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


def command(
    name: str,
    words: Sequence[str],
    folder: Path,
    env: Mapping[str, str] | None = None,
    before: Callable[[], None] | None = None,
) -> Ended:
    """Run a command of `grpo_mlflow.cli` in a folder; `before`, a function of a module, is called there first."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_WARM)
    files = folder / ".stdout", folder / ".stderr"
    process = context.Process(target=_child, args=(name, list(words), folder, files, dict(env or {}), before))
    process.start()
    process.join(_SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join()
    out, err = (path.read_text(errors="backslashreplace") if path.exists() else "" for path in files)
    return Ended(process.exitcode if process.exitcode is not None else -1, out, err)


def _child(
    name: str,
    words: list[str],
    folder: Path,
    files: tuple[Path, Path],
    env: dict[str, str],
    before: Callable[[], None] | None,
) -> None:
    for number, path in zip((1, 2), files, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    os.chdir(folder)
    for key in ("MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID"):
        os.environ.pop(key, None)
    os.environ.update(env)
    sys.path.insert(0, str(folder))
    sys.argv = [name, *words]
    code = 0
    try:
        if before is not None:
            before()
        run(import_module(f"grpo_mlflow.cli.{name}").main)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()  # as the interpreter would
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
