"""An open MLflow run: it is opened, described, and gets the status that it ends with."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from grpo_mlflow import tracking
from grpo_mlflow.config import Resolved
from grpo_mlflow.model.devices import choose_device
from grpo_mlflow.runs import naming
from grpo_mlflow.runs.description import describe
from grpo_mlflow.runs.ending import Ending
from grpo_mlflow.runs.stored import Stored
from grpo_mlflow.runtime import allocator, interrupts, output
from grpo_mlflow.runtime.console import Console
from grpo_mlflow.runtime.processes import Processes, join
from grpo_mlflow.tasks import data_sets
from grpo_mlflow.tracking import NullTracker, Tracker


@dataclass(frozen=True, slots=True)
class Nested:
    """Where a run stands that is part of another."""

    parent_run_id: str
    name: str
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Gathered:
    """The processes of a run that is not open yet: what can be refused is refused here, and leaves no run behind."""

    resolved: Resolved
    kind: str
    processes: Processes
    console: Console
    ending: Ending

    @contextmanager
    def opened(
        self, stored: Stored | None = None, nested: Nested | None = None, name: str | None = None
    ) -> Iterator[Tracker]:
        """Open the run, log what it is, and set its status to how the block ends; `name` of one that is not nested."""
        config, ending = self.resolved.config, self.ending
        try:
            # Nothing may stand between the block and the handlers: a signal there would leave the run without status.
            with interrupts.deferred():
                tracker = _open(ending, stored, nested, name or naming.of_run(self.resolved, self.kind))
        except interrupts.Interrupted:
            ending.not_begun()
            raise
        except BaseException as error:
            with interrupts.deferred():  # a signal must not hide what the run fails of
                if ending.tracker is not None:  # else it was not opened, or is marked already
                    ending.raised(ending.tracker, error)
                raise
        try:
            describe(tracker, self.resolved, self.kind, resumed=stored is not None and config.resume is not None)
            for table in data_sets.tables(config):
                self.console.say(table.line)
            yield tracker
        except BaseException as error:
            with interrupts.deferred():
                ending.raised(tracker, error)
                raise
        with interrupts.deferred():
            tracker.finish("FINISHED")


@contextmanager
def gathered(resolved: Resolved, kind: str, *, nested: bool = False) -> Iterator[Gathered]:
    """Connect the processes of a run, and handle signals; `nested` ones say nothing on the console."""
    config = resolved.config
    allocator.keep_freed()
    output.guard_logs()
    processes = join(config, choose_device(config.model.device))
    console = _console(resolved.warnings, processes.is_first, nested)
    ending = Ending(config, kind, processes, console)
    with interrupts.handled(), processes.watched(on_hang=ending.failed):
        try:
            yield Gathered(resolved, kind, processes, console, ending)
        except (interrupts.Interrupted, KeyboardInterrupt):
            if ending.tracker is None:
                console.say(f"\n{kind} stopped before a run was opened")
            raise


@contextmanager
def session(
    resolved: Resolved, kind: str, stored: Stored | None = None, nested: Nested | None = None
) -> Iterator[tuple[Processes, Tracker, Console]]:
    """Open a run that has nothing to refuse before, and set its status to how the block ends."""
    with gathered(resolved, kind, nested=nested is not None) as here, here.opened(stored, nested) as tracker:
        yield here.processes, tracker, here.console


def _console(warnings: Iterable[str], is_first: bool, is_nested: bool) -> Console:
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING if is_first else logging.ERROR)
    console = Console(quiet=is_nested or not is_first)
    for warning in warnings:
        console.warn(warning)
    return console


def _open(ending: Ending, stored: Stored | None, nested: Nested | None, name: str) -> Tracker:
    """Let the first process open the run; the others know it and write nothing. From then on `ending` can mark it."""
    config, kind, processes = ending.config, ending.kind, ending.processes
    opened: list[Tracker] = []

    def start() -> None:
        place = (nested.parent_run_id, nested.name, nested.tags) if nested else None
        ending.tracker = tracking.start(config.tracking, kind, stored.run_id if stored else None, place, name)
        opened.append(ending.tracker)
        if nested:
            opened[0].tags(nested.tags)

    processes.decided(start)
    run_id, run_dir = processes.broadcast((opened[0].run_id, opened[0].run_dir) if opened else ("", Path()))
    ending.tracker = opened[0] if opened else NullTracker(run_id, run_dir)
    return ending.tracker
