"""What samples in a run, opened and closed with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grpo_mlflow import generation
from grpo_mlflow.config import Config
from grpo_mlflow.errors import ServerFailed
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.runtime.console import Console
from grpo_mlflow.runtime.processes import Processes
from grpo_mlflow.tracking import Tracker


@contextmanager
def open_generators(
    config: Config,
    actor: Policy,
    source: str | Path,
    initial: str | Path,
    tracker: Tracker,
    console: Console,
    *,
    processes: Processes,
    trains: bool = True,
) -> Iterator[generation.Generators]:
    """Open what samples; the logs of servers of our own are kept with the run where one failed."""
    log = tracker.run_dir / "server.log"
    try:
        with generation.Generators(
            config, actor, source, initial, log, console.say, trains=trains, processes=processes
        ) as generators:
            yield generators
    except ServerFailed:
        for each in sorted(log.parent.glob(f"{log.stem}*{log.suffix}")):
            tracker.publish(each.name)
        raise
