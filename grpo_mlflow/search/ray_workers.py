"""Processes on a Ray cluster that join a study: one actor for each, which starts our command on its node.

Ray chooses the nodes, gives each actor its share of a GPU, and starts an actor again that died, on another node if
need be. It then repeats the actor's call, so the command joins the study again; trials are claimed in the study's
storage, which alone says what was done (docs/optimize.md).
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grpo_mlflow.config import Config, references
from grpo_mlflow.errors import UserError, one_line
from grpo_mlflow.runtime.console import Console

_PASSED = ("MLFLOW_", "GRPO_", "HF_", "PG", "OPENAI_")  # names of variables that a worker needs as the leader has them
_ENDING = 60.0  # seconds that workers have to put their trials back


class RayWorkers:
    """Actors that work on a study beside the leader.

    Args:
        config: the study's.
        command: the words of the leader's command line.
        console: is told of workers that end with an error.

    Raises:
        UserError: no cluster is reached, or it has machines that do not see the study's files.
    """

    def __init__(self, config: Config, command: Sequence[str], console: Console) -> None:
        import ray

        self._ray, self._search, self._console = ray, config.search, console
        _connect(ray)
        require_shared(config, {str(node["NodeManagerHostname"]) for node in ray.nodes() if node["Alive"]})
        self._words = ["-m", "grpo_mlflow", "optimize", *command]
        self._actors: list[Any] = []
        self._calls: dict[Any, int] = {}

    @contextmanager
    def running(self) -> Iterator[RayWorkers]:
        """See `Launcher.running`."""
        search, room = self._search, self._ray.cluster_resources()
        gpus = search.gpus_per_worker
        if gpus is None:
            gpus = 1.0 if room.get("GPU") else 0.0
        kind = self._ray.remote(max_restarts=-1, max_task_retries=-1, max_concurrency=2)(_Worker)
        kind = kind.options(num_cpus=search.cpus_per_worker, num_gpus=gpus)
        self._warn_of_room(room, gpus)
        environment = passed(os.environ) | {"OMP_NUM_THREADS": str(search.cpus_per_worker)}
        try:
            for number in range(search.n_jobs - 1):
                actor = kind.remote()
                self._actors.append(actor)
                self._calls[actor.run.remote(self._words, environment, str(Path.cwd()))] = number
            yield self
        finally:
            self._end()

    def look_after(self) -> None:
        """See `Launcher.look_after`: Ray itself replaces those that died."""
        ended, _ = (
            self._ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0) if self._calls else ([], [])
        )
        for call in ended:
            number = self._calls.pop(call)
            try:
                code, line = self._ray.get(call)
            except self._ray.exceptions.RayError as error:
                code, line = 1, one_line(error)
            if code:
                self._console.warn(f"worker {number + 1} on Ray ended with exit code {code}: {line}")

    def _end(self) -> None:
        """Let workers put their trials back into the queue, then end them."""
        stopping = [actor.stop.remote() for actor in self._actors]
        if stopping:
            self._ray.wait(stopping, num_returns=len(stopping), timeout=_ENDING)
        for actor in self._actors:
            self._ray.kill(actor)
        self._ray.shutdown()

    def _warn_of_room(self, room: Mapping[str, float], gpus: float) -> None:
        asked = {"GPU": gpus, "CPU": float(self._search.cpus_per_worker)}
        fitting = min(int(room.get(name, 0.0) / share) for name, share in asked.items() if share)
        if fitting < self._search.n_jobs - 1:
            has = ", ".join(f"{room.get(name, 0.0):g} {name}s" for name in asked)
            self._console.warn(
                f"search.n_jobs = {self._search.n_jobs}: the Ray cluster has {has}, room for {fitting} workers beside "
                "this process; the others wait for it"
            )


def _connect(ray: Any) -> None:
    address = os.environ.get("RAY_ADDRESS", "auto")
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdigit() and "//" not in host:  # where nothing listens, Ray itself tries for minutes
            socket.create_connection((host, int(port)), timeout=5.0).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"search.launcher = 'ray': no Ray cluster at {address!r} ({one_line(error)}); allowed: to start one "
            "(ray start --head) or to name one in RAY_ADDRESS, or local"
        ) from error


def passed(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that a worker gets: some by their names, and those that settings refer to."""
    named = references.names()
    found = {name: value for name, value in environment.items() if name.startswith(_PASSED) or name in named}
    found.pop("MLFLOW_RUN_ID", None)  # the parent's
    return found


def require_shared(config: Config, hosts: set[str]) -> None:
    """Raise UserError where machines would each look for the study in a file of their own."""
    others = sorted(hosts - {socket.gethostname()})
    if not others:
        return
    given = {
        "search.storage": (config.search.storage, "postgresql://..., or journal:FILE on a shared file system"),
        "tracking.uri": (
            config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI"),
            "the http:// address of an MLflow server, or postgresql://...",
        ),
    }
    for key, (value, allowed) in given.items():
        scheme = str(value or "").partition(":")[0]  # none: a folder, or the default file
        if scheme in ("", "sqlite", "file") or ":" not in str(value):
            raise UserError(f"{key} = {value!r}: the Ray cluster has other machines ({others[0]}); allowed: {allowed}")


class _Worker:
    """Lives in a process of Ray's, and has our command as its child."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._stopped = False

    def run(self, words: Sequence[str], environment: Mapping[str, str], folder: str) -> tuple[int, str]:
        """Run the command to its end; return its exit code and the last line of its errors."""
        if self._stopped:
            return 0, ""
        self._process = subprocess.Popen(
            [sys.executable, *words],
            env={**os.environ, **environment},
            cwd=folder if Path(folder).is_dir() else None,  # the leader's, where this node has it
            stderr=subprocess.PIPE,
            text=True,
        )
        last = ""
        for line in self._process.stderr or ():
            print(line, end="", file=sys.stderr, flush=True)  # for Ray's log
            last = line.strip() or last
        code = self._process.wait()
        return (0 if self._stopped else code), last

    def stop(self) -> None:
        """Let the command put its trial back, and wait for its end."""
        self._stopped = True
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait()
