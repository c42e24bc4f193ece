"""Where the further processes of a study run, that `search.n_jobs` asks for: one class for each `search.launcher`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from grpo_mlflow.config import Config
from grpo_mlflow.runtime.console import Console
from grpo_mlflow.search.workers import Workers


class Launcher(Protocol):
    """Keeps processes at work that join the study; the study's storage tells what they do."""

    def running(self) -> AbstractContextManager[object]:
        """Start them, and end them with the block; what they have under way goes back into the queue."""
        ...

    def look_after(self) -> None:
        """Replace those that died, or say what became of them; called between the leader's own trials."""
        ...


def _local(config: Config, command: Sequence[str], console: Console) -> Launcher:
    return Workers(config.search.n_jobs - 1, command)


def _ray(config: Config, command: Sequence[str], console: Console) -> Launcher:
    if config.search.n_jobs == 1:  # no cluster is needed
        return _local(config, command, console)
    from grpo_mlflow.search.ray_workers import RayWorkers  # the package is optional, and slow to import

    return RayWorkers(config, command, console)


_MAKE: dict[str, Callable[[Config, Sequence[str], Console], Launcher]] = {"local": _local, "ray": _ray}


def create(config: Config, command: Sequence[str], console: Console) -> Launcher:
    """Return what runs the further processes of a study; `command` are the words of the leader's command line.

    Raises:
        UserError: the cluster cannot be reached, or its machines could not work on this study.
    """
    return _MAKE[config.search.launcher](config, command, console)
