"""The servers of a run with several processes: the first one talks to them, for all.

Each process asks for its own prompts, and makes completions of its own draws. The others send what they ask for to the
first, which hands all to the servers and sends draws back as soon as they are there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import nullcontext, suppress
from typing import Any

from grpo_mlflow.generation.server.batches import Told
from grpo_mlflow.generation.server.engine import Ask, Draw
from grpo_mlflow.generation.server.fleet import Fleet
from grpo_mlflow.generation.server.servers import Servers
from grpo_mlflow.model import sharding
from grpo_mlflow.runtime.mail import Mail
from grpo_mlflow.runtime.processes import Processes

Drawn = dict[int, list[Draw]]


def shared(make: Callable[[], Fleet], processes: Processes | None, model: Any) -> Servers:
    """Return the servers that `make` returns, as this process has them; all processes call it in step.

    `model` is what they are to serve: if it is in shards, all processes give theirs.
    """
    if processes is None or processes.count == 1:
        return make()
    if processes.is_first:
        return Leading(processes.agreed(make), processes, model)
    processes.agreed(lambda: None)
    return Following(processes, model)


class Leading:
    """The servers in the first process, which asks them for all processes."""

    def __init__(self, fleet: Fleet, processes: Processes, model: Any) -> None:
        self._model = model
        self._fleet, self._processes, self._mail = fleet, processes, Mail(processes.rank)
        self._others = range(1, processes.count)
        self.version = fleet.version

    @property
    def url(self) -> str:
        return self._fleet.url

    def sync(self, version: int) -> None:
        """As `Fleet.sync`; all processes call it, and all go on or end together."""

        def lead() -> None:
            exchanges = sharding.is_sharded(self._model)
            together = self._processes.collective(common=False) if exchanges else nullcontext()
            with together, sharding.leading(self._model):
                self._fleet.sync(version)
            for other in self._others:
                self._mail.post(other, self._fleet.version)

        self._processes.agreed(lead)
        self.version = self._fleet.version

    def rest(self) -> None:
        self._fleet.rest()

    def start(self, asks: Sequence[Ask], at_once: int, told: Told | None = None) -> Future[list[list[Draw]]]:
        """As `Fleet.start`, with what the others ask for, too; call it in a phase (`Processes.agreed`) of all."""
        shares = [asks, *(self._mail.wait(other) for other in self._others)]
        # in the order of the problems, of which each process has every N-th
        asked = sorted(((place, rank) for rank, share in enumerate(shares) for place in range(len(share))))
        known: Drawn = {}

        def drawn(number: int, draws: Sequence[Draw]) -> None:
            place, rank = asked[number]
            known[number] = list(draws)
            if rank:
                self._mail.post(rank, (place, draws))
            elif told is not None:
                told(place, draws)

        def distributed(found: Sequence[list[Draw]]) -> list[list[Draw]]:
            changed: list[Drawn] = [{} for _ in shares]  # since they were told: drawn again, by another server perhaps
            for number, (place, rank) in enumerate(asked):
                if rank and known.get(number) != found[number]:
                    changed[rank][place] = found[number]
            for other in self._others:
                self._mail.post(other, (None, changed[other]))
            return [found[number] for number, (_, rank) in enumerate(asked) if not rank]

        every = self._fleet.start([shares[rank][place] for place, rank in asked], at_once, drawn)
        return _then(every, distributed)

    def metrics(self) -> dict[str, float]:
        return self._fleet.metrics()

    def close(self) -> None:
        self._fleet.close()


class Following:
    """The servers in another process than the first: what they draw comes from there."""

    url = "the servers of process 0"

    def __init__(self, processes: Processes, model: Any) -> None:
        self._model = model
        self._processes, self._mail = processes, Mail(processes.rank)
        self.version: int | None = None

    def sync(self, version: int) -> None:
        """Wait until the servers have the weights, and give the first process the shards of this one for them."""

        def follow() -> int | None:
            if sharding.is_sharded(self._model):
                with self._processes.collective(common=False):
                    sharding.take_part(self._model)
            version: int | None = self._mail.wait(0)
            return version

        self.version = self._processes.agreed(follow)

    def rest(self) -> None:
        """The first process does it."""

    def start(self, asks: Sequence[Ask], at_once: int, told: Told | None = None) -> Future[list[list[Draw]]]:
        self._mail.post(0, [*asks])
        future = Future[list[list[Draw]]]()

        def receive() -> None:
            found: Drawn = {}
            try:
                while (message := self._mail.wait(0, future.cancelled)) is not None:
                    place, draws = message
                    if place is None:
                        found |= draws
                        return future.set_result([found[number] for number in range(len(asks))])
                    found[place] = draws
                    if told is not None:
                        told(place, draws)
            except InvalidStateError:  # cancelled meanwhile
                return None
            except Exception as error:
                with suppress(InvalidStateError):
                    future.set_exception(error)

        threading.Thread(target=receive, name="draws", daemon=True).start()
        return future

    def metrics(self) -> dict[str, float]:
        return {}  # those of the first process are of all

    def close(self) -> None: ...


def _then(
    first: Future[list[list[Draw]]], work: Callable[[list[list[Draw]]], list[list[Draw]]]
) -> Future[list[list[Draw]]]:
    """Return what `work` makes of the result; a cancellation reaches the first future, too."""
    found = Future[list[list[Draw]]]()

    def finish(done: Future[list[list[Draw]]]) -> None:
        with suppress(InvalidStateError):  # cancelled meanwhile
            try:
                found.set_result(work(done.result()))
            except InvalidStateError:
                raise
            except BaseException as error:
                found.set_exception(error)

    first.add_done_callback(finish)
    found.add_done_callback(lambda done: first.cancel() if done.cancelled() else None)
    return found
