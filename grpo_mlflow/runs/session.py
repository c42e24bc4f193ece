"""An open MLflow run: what it is, and the status that it ends with."""

from __future__ import annotations

import errno
import logging
import math
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version as version_of
from pathlib import Path

import torch

from grpo_mlflow import __version__, tracking
from grpo_mlflow.config import Config, Resolved, dump, flatten
from grpo_mlflow.errors import Pruned, UserError, one_line
from grpo_mlflow.model.policy import choose_device
from grpo_mlflow.runs import messages
from grpo_mlflow.runs.stored import Stored
from grpo_mlflow.runtime import allocator, interrupts
from grpo_mlflow.runtime.console import Console
from grpo_mlflow.runtime.processes import Processes, join
from grpo_mlflow.tracking import NullTracker, Tracker


@dataclass(frozen=True, slots=True)
class Nested:
    """Where a run stands that is part of another."""

    parent_run_id: str
    name: str
    tags: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def session(
    resolved: Resolved, kind: str, stored: Stored | None = None, nested: Nested | None = None
) -> Iterator[tuple[Processes, Tracker, Console]]:
    """Open the run, log what it is, and set its status to how the block ends."""
    config = resolved.config
    allocator.keep_freed()
    processes = join(config, choose_device(config.model.device))
    level = logging.WARNING if processes.is_first else logging.ERROR
    logging.basicConfig(format="%(levelname)s: %(message)s", level=level)
    console = Console(quiet=nested is not None or not processes.is_first)
    for warning in resolved.warnings:
        console.warn(warning)
    opened: Tracker | None = None

    def fail() -> None:
        if opened is not None:
            _fail(config, kind, opened, processes, console)

    with interrupts.handled(), processes.watched(on_hang=fail):
        try:
            with interrupts.deferred():
                opened = _open(config, kind, stored, nested, processes)
        except interrupts.Interrupted:
            if opened is not None:
                opened.finish("KILLED")
            raise
        tracker = opened
        try:
            described = config.model_copy(update={"resume": None})
            tracker.params(_parameters(described, kind))
            tracker.tags(_versions())
            tracker.text("config/resolved.yaml", dump(described))
            if stored is not None and resolved.config.resume is not None:
                changed = [f"{key}={flatten(described.model_dump())[key]}" for key in _overridden(resolved)]
                tracker.tags({"grpo.resumed_with": " ".join(changed)})
            yield processes, tracker, console
        except Pruned:
            tracker.tags({"optuna.state": "PRUNED"})
            tracker.finish("KILLED")
            raise
        except (interrupts.Interrupted, KeyboardInterrupt):
            tracker.finish("KILLED")
            console.say(messages.how_to_resume(config, kind, tracker, "stopped"))
            raise
        except BaseException as error:
            fail()
            full = os.strerror(errno.ENOSPC) in str(error)  # also in what other libraries make of it
            if full and not isinstance(error, UserError):
                raise UserError(f"the disk is full: {one_line(error)}") from error
            raise
        with interrupts.deferred():
            tracker.finish("FINISHED")


def _parameters(config: Config, kind: str) -> dict[str, object]:
    """Return what MLflow shows of the config; lr on its log scale too, since the UI's axes are linear."""
    flat = flatten(config.model_dump(mode="json"))
    hidden = "resume" if kind == "optimize" else ("resume", "search.")
    shown = {key: value for key, value in flat.items() if not key.startswith(hidden)}
    return {**shown, "train.log10_lr": round(math.log10(config.train.lr), 6)}


def _open(config: Config, kind: str, stored: Stored | None, nested: Nested | None, processes: Processes) -> Tracker:
    """Let the first process open the run; the others know it and write nothing."""
    opened: list[Tracker] = []

    def start() -> None:
        place = (nested.parent_run_id, nested.name, nested.tags) if nested else None
        opened.append(tracking.start(config.tracking, kind, stored.run_id if stored else None, place))
        if nested:
            opened[0].tags(nested.tags)

    processes.decided(start)
    run_id, run_dir = processes.broadcast((opened[0].run_id, opened[0].run_dir) if opened else ("", Path()))
    return opened[0] if opened else NullTracker(run_id, run_dir)


def _fail(config: Config, kind: str, tracker: Tracker, processes: Processes, console: Console) -> None:
    """Mark the run FAILED and say how to go on; where the process that tracks it is gone, the second does."""
    if processes.first_lost and processes.rank == 1:
        console = Console()
        tracking.set_failed(config.tracking.uri, tracker.run_id)
    try:
        tracker.finish("FAILED")
    except OSError as error:  # a full disk, of which the run may have failed: what failed first is told
        console.warn(f"run {tracker.run_id} could not be marked FAILED: {one_line(error)}")
    console.say(messages.how_to_resume(config, kind, tracker, "failed"))


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "accelerate", "mlflow")
    found = {f"version.{name}": version_of(name) for name in packages}
    return {
        **found,
        "version.grpo_mlflow": __version__,
        "version.python": platform.python_version(),
        "machine.threads": str(torch.get_num_threads()),  # bit-exact repetition needs the same number
    }


def _overridden(resolved: Resolved) -> list[str]:
    return [key for key, origin in resolved.origins.items() if origin == "override" and key != "resume"]
