"""The servers of a run, one or several, as one: they get the same weights and share each batch.

One that is away while others work holds nothing up: the others draw its prompts, and it gets the weights of the time
when it is back. Before the first batch all have to be there.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from grpo_mlflow.config import GenerationConfig
from grpo_mlflow.errors import ServerAway, redact
from grpo_mlflow.generation.server import batches, canary
from grpo_mlflow.generation.server.batches import Told
from grpo_mlflow.generation.server.engine import Ask, Draw, Remedies
from grpo_mlflow.generation.server.policy_server import TEXT, PolicyServer, Priced
from grpo_mlflow.generation.server.sync import SYNCS
from grpo_mlflow.generation.server.weights import WeightsFolder
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.runtime.http.client import Loop, all_of

T = TypeVar("T")
_LOOK = 0.1  # seconds between two looks at which servers fail
log = logging.getLogger(__name__)


class Fleet:
    """Servers and the policy that they are to serve. `version` is the one that they serve, None before the first sync.

    Args:
        servers: at least one.
        policy: the trainer's model, whose weights they get.
        settings: how they get them.
        initial: loads the policy of version 0, which servers that are sent no weights keep serving.
    """

    def __init__(
        self,
        servers: Sequence[PolicyServer],
        policy: Policy,
        settings: GenerationConfig,
        initial: Callable[[], Policy],
    ) -> None:
        self._servers, self._policy, self._initial = tuple(servers), policy, initial
        self._sync, self._weights = SYNCS[settings.sync], WeightsFolder(settings.sync_dir)
        self._loop = Loop()
        self._late: dict[PolicyServer, asyncio.Future[bool]] = {}  # those that do not have the newest weights yet
        self._away = set[PolicyServer]()  # those of which it was told
        self._opened, self._seconds = False, 0.0
        self.version: int | None = None

    @property
    def url(self) -> str:
        return ", ".join(server.url for server in self._servers)

    @property
    def remedies(self) -> Remedies:
        """What a person can do about servers of this kind."""
        return self._servers[0].remedies

    @property
    def folder(self) -> Path | None:
        """The weights that the servers were last given."""
        return self._weights.newest

    @property
    def price_gap(self) -> float | None:
        """As that of its servers, the largest; None: it was not checked."""
        gaps = [server.price_gap for server in self._servers if server.price_gap is not None]
        return max(gaps, default=None)

    def remedy(self, instead: str = "") -> str:
        return self._servers[0].remedy(instead)

    def parts(self) -> list[Fleet]:
        """Return each server as a fleet of its own, to examine them in turn; they end with this one."""
        found = []
        for server in self._servers:
            found.append(copy.copy(self))
            found[-1]._servers = (server,)
        return found

    # Before the first weights

    def open(self) -> None:
        """Start the servers that the run is to start, all at once.

        Raises:
            UserError: there is no such interpreter.
            ServerFailed: one of them ended, or did not answer in time.
        """
        if not self._opened:
            self._loop.run(self._each(lambda server: server.start()))
            self._opened = True

    def connect(self) -> list[str]:
        """Make sure that all servers give what training needs, and return their names for what they serve.

        Raises:
            ServerFailed: one cannot be reached, or lacks something.
        """
        self.open()
        return self._loop.run(self._each(lambda server: server.connect()))

    def check_tokenizer(self) -> int:
        """Return the number of tokens of a test text that all servers split as the trainer does, 0: one does not tell.

        Raises:
            ServerFailed: one gives no usable answer, or differs.
        """
        ours: list[int] = self._policy.tokenizer(TEXT, add_special_tokens=False).input_ids
        return min(self._loop.run(self._each(lambda server: server.check_tokenizer(ours))))

    # Weights

    def sync(self, version: int) -> None:
        """Let the servers serve the policy's weights, those after `version` iterations, and prove it.

        Raises:
            ServerFailed: none can be reached, or one cannot load them or serves something else afterwards; as
                `ServerUnfit` where another start of the server mends it. At first: one cannot be reached.
        """
        wanted = version if self._sync.sends else 0
        if wanted == self.version:
            return
        began, is_first = time.perf_counter(), self.version is None
        names = self.connect() if is_first else []
        if is_first:
            self.check_tokenizer()
        self._loop.run(self._give_up_late())
        policy = self._policy if wanted == version else self._initial()
        lacking = self._expect(policy, names, version)
        is_there = is_first and self._sync.is_there_at_start(self._policy)
        priced = self._loop.run(self._deliver(lacking, policy, is_there, is_first))
        self.version = wanted
        for server, found in priced.items():
            if found is not None:
                server.believe(policy, found)
        self._seconds += time.perf_counter() - began

    def _expect(self, policy: Policy, names: Sequence[str], version: int) -> list[PolicyServer]:
        """Let the servers expect the weights of `policy`, and return those that are to be given them.

        Args:
            names: what servers that have just been connected say that they serve.
        """
        expected = canary.expected(policy, canary.tokens(policy))
        for server in self._servers:
            server.expect(expected)
        lacking = [*self._servers]
        if names:
            asked = zip(self._servers, names, strict=True)
            have = self._loop.run(all_of([server.has_them(name) for server, name in asked]))
            lacking = [server for server, has_them in zip(self._servers, have, strict=True) if not has_them]
            if lacking and self._sync.in_place:
                tied = bool(getattr(self._policy.model.config, "tie_word_embeddings", False))
                self._loop.run(all_of([server.require_loads(tied) for server in lacking]))
        if lacking:
            package = self._sync.pack(self._policy, self._weights, version)
            for server in lacking:
                server.give(package)
        return lacking

    async def _deliver(
        self, servers: Sequence[PolicyServer], policy: Policy, is_there: bool, to_all: bool
    ) -> dict[PolicyServer, Priced | None]:
        """Wait until all have the weights of `policy`; if not `to_all`, those that fail may come later than the others.

        Return what they price, to be checked. One that comes later is checked after the next load: by then the trainer
        may have changed the weights that its prices are of.
        """

        async def taken(server: PolicyServer) -> Priced | None:
            await server.take(is_there)
            return await server.priced(policy)

        taking: dict[asyncio.Future[Any], PolicyServer]
        taking = {asyncio.ensure_future(taken(server)): server for server in servers}
        served, away = dict[PolicyServer, Priced | None](), dict[PolicyServer, ServerAway]()
        try:
            while taking:
                done, _ = await asyncio.wait(taking, timeout=_LOOK, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    server = taking.pop(task)
                    try:
                        served[server] = task.result()
                        self._is_back(server)
                    except ServerAway as failed:
                        if to_all or not server.patient:
                            raise
                        away[server] = failed
                if served and not to_all and all(server.failing for server in taking.values()):
                    break
        except BaseException:
            for task in taking:
                task.cancel()
            await asyncio.gather(*taking, return_exceptions=True)
            raise
        if away and not served:
            raise next(iter(away.values()))
        for server in away:
            taking[asyncio.ensure_future(server.take())] = server
        for task, server in taking.items():
            if server not in self._away:
                self._away.add(server)
                log.warning("the server at %s is away: the run goes on with the others", redact(server.url))
            self._late[server] = late = asyncio.ensure_future(self._served_late(server, task))
            late.add_done_callback(lambda each: each.cancelled() or each.exception())  # a batch or nobody asks for it
        return served

    async def _served_late(self, server: PolicyServer, taking: asyncio.Future[Any]) -> bool:
        """Wait until a server has its weights, however long that takes."""
        while True:
            try:
                await taking
            except ServerAway as away:
                log.warning("%s; the run goes on with the other servers", redact(str(away)))
                taking = asyncio.ensure_future(server.take())
                continue
            self._is_back(server)
            return True

    def _is_back(self, server: PolicyServer) -> None:
        if server in self._away:
            self._away.remove(server)
            log.warning("the server at %s is back, with the newest weights", redact(server.url))

    async def _give_up_late(self) -> None:
        """Give no server the weights of before any more: their folder goes."""
        late, self._late = self._late, {}
        for each in late.values():
            each.cancel()
        await asyncio.gather(*late.values(), return_exceptions=True)

    # Batches

    def start(self, asks: Sequence[Ask], at_once: int, told: Told | None = None) -> Future[list[list[Draw]]]:
        return self._loop.start(self._sampled(asks, at_once, told))

    async def _sampled(self, asks: Sequence[Ask], at_once: int, told: Told | None) -> list[list[Draw]]:
        late = {server: asyncio.shield(each) for server, each in self._late.items()}
        return await batches.sample(self._servers, asks, at_once, told, late)

    def rest(self) -> None:
        self._loop.run(all_of([server.rest() for server in self._servers if server not in self._late]))

    def metrics(self) -> dict[str, float]:
        """Return what happened since the last call: sums over the servers, of errors the largest."""
        each = [server.metrics() for server in self._servers]
        found = {name: sum(one[name] for one in each) for name in each[0]}
        found["server_canary_error"] = max(one["server_canary_error"] for one in each)
        found["seconds_sync"], self._seconds = self._seconds, 0.0
        return found

    def close(self) -> None:
        """Close connections, end servers of ours, delete the weights written for them."""
        for server in self._servers:
            server.end()
        if not self._loop.close(self._disconnect):
            log.warning("connections to %s did not close in time", redact(self.url))
        self._weights.close()

    async def _disconnect(self) -> None:
        await self._each(lambda server: server.disconnect())

    def _each(self, work: Callable[[PolicyServer], Awaitable[T]]) -> Coroutine[Any, Any, list[T]]:
        return all_of([work(server) for server in self._servers])
