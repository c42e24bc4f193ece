"""The link to one server: requests are repeated until they succeed, and what broke on the way is repaired first."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

from grpo_mlflow.errors import ServerFailed
from grpo_mlflow.generation.base import Sampling
from grpo_mlflow.generation.server.checksums import WeightSums
from grpo_mlflow.generation.server.copies import copied
from grpo_mlflow.generation.server.engine import Ask, Draw, Engine, check, shaped
from grpo_mlflow.generation.server.process import ServerProcess
from grpo_mlflow.generation.server.sleep import Sleep
from grpo_mlflow.generation.server.sync import Package
from grpo_mlflow.runtime.http.client import Fault
from grpo_mlflow.runtime.http.retries import Retries

T = TypeVar("T")
log = logging.getLogger(__name__)


class Link:
    """Asks one server, with retries; a dead server of our own is started again, a restarted one gets its weights back.

    `given` are the weights that the server is to have, None where it is sent none. `loads` counts what may have changed
    the weights that it samples from, `restarts` what of that was a start. `priced` is a way to draw whose
    log-probabilities are known to be right, apart from the plain one, with which they always are.

    Args:
        engine: how to speak to it.
        vocabulary: how many token ids the policy knows.
        retry_seconds: how long a request is repeated; 0: not at all.
        process: the server, if this run started it.
    """

    def __init__(self, engine: Engine, vocabulary: int, retry_seconds: float, process: ServerProcess | None) -> None:
        self.engine, self.vocabulary, self.retries = engine, vocabulary, retry_seconds > 0
        self._patience, self._process = Retries(engine.client.root, retry_seconds), process
        self._repairing, self._sleep = asyncio.Lock(), Sleep(engine.client)
        self._look: asyncio.Future[str | None] | None = None
        self._start: asyncio.Future[None] | None = None
        self._told_end: str | None = None
        self.given: Package | None = None
        self.priced: Sampling | None = None
        self.loads = self.restarts = 0

    @property
    def retried(self) -> int:
        """How often a request was repeated."""
        return self._patience.count

    @property
    def events(self) -> int:
        """How often something happened that may have been a new start, or came with one: loads, repeated requests."""
        return self.loads + self.retried

    @property
    def failing(self) -> bool:
        """Whether a request has failed, and none was answered since."""
        return self._patience.failing

    async def ask(self, what: str, request: Callable[[], Awaitable[T]]) -> T:
        """Return what `request` returns; `what` names it in messages.

        Raises:
            ServerFailed: the time for retries is spent.
        """
        return await self._patience.ask(what, lambda: self._told(request), self._repair)

    async def connect(self, request: Callable[[], Awaitable[T]]) -> T:
        """As `ask`, for the first request: there is nothing to repair but a server of our own that ended."""
        return await self._patience.ask("connecting", lambda: self._told(request), self._revive)

    async def rest(self) -> None:
        """Put the server to sleep until it is next asked."""
        await self.ask("putting it to sleep", self._sleep.begin)

    async def recover(self) -> None:
        """Bring a server that fails back, and with it the weights that it is to have.

        Raises:
            ServerAway: the time for retries is spent.
        """

        async def nothing() -> None: ...

        await self._patience.ask("connecting", lambda: self._told(self._repair), nothing)

    async def label(self) -> str | None:
        return await self.ask("asking for the weights' label", self._label)

    async def complete(self, ask: Ask) -> list[Draw]:
        """Return completions that can be those asked for; one try."""
        draws = await shaped(self.engine.complete(ask))
        check(draws, ask, self.vocabulary, self.engine.remedies.context)
        if ask.logprobs and (ask.sampling == self.priced or ask.sampling.is_plain):
            found = copied([draw.token_ids for draw in draws], [draw.logprobs or () for draw in draws])
            if found:
                raise Fault(found)
        return draws

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        """Return the log-probability of each token but the first; one try."""
        return await shaped(self.engine.score(token_ids))

    async def sums(self) -> WeightSums | None:
        """Return sums over the weights that the server computes with, None where it cannot say.

        Raises:
            ServerFailed: the time for retries is spent.
        """
        seed = self.loads  # other columns after each load
        return await self.ask("summing weights", lambda: shaped(self.engine.sums(seed)))

    async def adapter_sums(self) -> Sequence[WeightSums] | None:
        """Return as `sums` those over each adapter that the server computes with, None where it cannot say."""
        return await self.ask("summing adapters", lambda: shaped(self.engine.adapter_sums()))

    async def load(self) -> None:
        """Let the server take on the weights of `given`."""
        self._patience.failing = False  # what failed before may have been given up: nobody has asked since
        await self._patience.ask("loading weights", lambda: self._told(self._load), self._reconnect)

    async def _told(self, request: Callable[[], Awaitable[T]]) -> T:
        """Ask; a failure whose cause is that a server of our own ended is told as that."""
        try:
            await self._sleep.end()
            return await request()
        except Fault as fault:
            ended = None if fault.answered else await self._ended()
            if ended is None:
                raise
            self._told_end = ended
            raise Fault(ended) from None

    async def _ended(self) -> str | None:
        """Return how a server of our own ended, None where it runs; looked at once for requests that fail together."""
        if self._process is None:
            return None
        if self._look is None or self._look.done():
            self._look = asyncio.ensure_future(asyncio.to_thread(self._process.ended))
        return await asyncio.shield(self._look)

    async def _repair(self) -> None:
        """Before a request is repeated: bring the server back, and with it the weights that it is to have."""
        async with self._repairing:
            await self._reconnect()
            if self.given is not None and self.given.label is not None:
                label = await self._label()
                if label is not None and label != self.given.label:
                    await self._load()

    async def _label(self) -> str | None:
        return await shaped(self.engine.label())

    async def _load(self) -> None:
        assert self.given is not None
        self.loads += 1
        await shaped(self.given.load(self.engine, self._start_again))

    async def _reconnect(self) -> None:
        await self._revive()
        await shaped(self.engine.connect())

    async def _revive(self) -> None:
        await self._settle_start()
        if self._process is not None and not self._process.alive:
            ended = await self._ended()
            if ended not in (None, self._told_end):  # after an answer that gave no reason to look, such as 500
                log.warning("%s; it is started again", ended)
            # What has a label is loaded afterwards anyway, and its folder may go while the server starts.
            model = self.given.model if self.given and self.given.label is None else None
            await self._start_again(model or self._process.model)

    async def _start_again(self, model: str | Path) -> None:
        assert self._process is not None
        await self._settle_start()
        self.restarts += 1
        self.loads += 1  # what was drawn before may be lost with the connection: the batch is drawn again
        self._start = asyncio.ensure_future(asyncio.to_thread(self._process.start, model))
        self._start.add_done_callback(lambda each: each.cancelled() or each.exception())  # perhaps nobody waits for it
        try:
            await asyncio.shield(self._start)
        except ServerFailed as failed:
            raise Fault(str(failed)) from failed

    async def _settle_start(self) -> None:
        """Wait for the end of a start whose request was given up: a second one beside it would take its port."""
        while self._start is not None and not self._start.done():
            await asyncio.wait({self._start})
