"""A server that samples from the policy: weights that provably arrive, faults that cost time and nothing else.

Whatever fails is asked for again with the same seeds, so the rollouts of a run do not depend on what went wrong on the
way; where they cannot be had, the run stops. After each load the server proves that it serves the weights it should
(`canary`), and after each batch that it still does. If it lost them in the middle of a batch, by a restart, it gets
them again and the whole batch is drawn again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from grpo_mlflow.config import GenerationConfig
from grpo_mlflow.errors import ServerFailed
from grpo_mlflow.generation.base import Sampling
from grpo_mlflow.generation.server import canary
from grpo_mlflow.generation.server.client import Fault, Loop, Refusal, all_of
from grpo_mlflow.generation.server.engine import Ask, Draw, Engine, Incapable, check
from grpo_mlflow.generation.server.process import ServerProcess
from grpo_mlflow.generation.server.retries import Retries
from grpo_mlflow.generation.server.weights import WeightsFolder
from grpo_mlflow.model.policy import Policy

T = TypeVar("T")
_ROUNDS = 5  # how often a batch, or a load, is repeated because the weights were lost on the way
log = logging.getLogger(__name__)


class _WrongWeights(Exception):
    """The server does not serve what it should."""


class PolicyServer:
    """One server and the policy it is to serve.

    Args:
        engine: how to speak to it.
        policy: the trainer's model, whose weights it gets.
        settings: sync, timeouts, retries.
        initial: loads the policy of version 0, which a server without `sync` keeps serving.
        process: the server, where this run started it: with the policy's present weights (of one with an adapter, its
            base's), without `sync` the initial.
    """

    def __init__(
        self,
        engine: Engine,
        policy: Policy,
        settings: GenerationConfig,
        initial: Callable[[], Policy],
        process: ServerProcess | None = None,
    ) -> None:
        self._engine, self._policy, self._settings, self._process = engine, policy, settings, process
        self._initial = initial
        self._loop = Loop()
        self._retries = Retries(self.url, settings.retry_seconds)
        self._mending = asyncio.Lock()
        self._weights = WeightsFolder(settings.sync_dir)
        self._label: str | None = None  # what the server calls the weights that it was given
        self._canary = canary.tokens(policy)
        self._expected: canary.Expected | None = None
        self._reading: canary.Reading | None = None
        self._connected = False
        self.version: int | None = None
        self._loads = self._restarts = self._redraws = self._reported_retries = 0
        self._error = self._seconds = 0.0
        self.vocabulary: int = policy.model.get_input_embeddings().num_embeddings

    @property
    def url(self) -> str:
        return self._engine.client.root

    @property
    def folder(self) -> Path | None:
        """The weights that the server was last given."""
        return self._weights.newest

    def connect(self) -> str:
        """Make sure that the server gives what training needs, and return its name for what it serves.

        Raises:
            ServerFailed: it cannot be reached, or lacks something.
        """
        return self._loop.run(self._guarded(lambda: self._retries.ask("connecting", self._connect, self._mend)))

    def tokenize(self, text: str) -> list[int]:
        """Return the server's tokens of a text."""

        async def work() -> list[int]:
            return await _shaped(self._engine.tokenize(text))

        return self._loop.run(self._guarded(lambda: self._retries.ask("tokenizing", work, self._mend)))

    # Weights

    def sync(self, version: int) -> None:
        """Let the server serve the policy's weights, those after `version` iterations, and prove it.

        Raises:
            ServerFailed: it cannot be reached, cannot load them, or serves something else afterwards.
        """
        static = self._settings.sync == "none"
        if version == self.version or (static and self._connected):
            return
        began = time.perf_counter()
        if not self._connected:
            self.connect()
        before, policy = self._expected, self._initial() if static and version else self._policy
        self._expected = canary.expected(policy, self._canary)
        if static:
            self._loop.run(self._guarded(self._prove))
        else:
            folder = self._weights.write(self._policy, version, self._settings.sync == "lora")
            self._label = folder.name if self._settings.sync != "restart" else None
            started_with_them = (
                self._settings.sync == "restart" and not self._connected and not self._policy.has_adapter
            )
            self._loop.run(self._guarded(lambda: self._deliver(before, started_with_them)))
        self._connected, self.version = True, 0 if static else version
        self._seconds += time.perf_counter() - began

    async def _deliver(self, before: canary.Expected | None, has_them: bool) -> None:
        """Give the server the newest weights and let it prove them; once more where something came between."""
        for last in (False, True) if self._settings.retry_seconds else (True,):
            if not has_them:
                await self._retries.ask("loading weights", self._load, self._reconnect)
            has_them = False
            try:
                await self._prove(before)
                return
            except _WrongWeights as wrong:
                if last:
                    raise ServerFailed(
                        f"the server was given new weights, but {wrong}. Rollouts would be another policy's, so the "
                        "run stops. Known causes: another run that uses the same server; vLLM on a CPU with tied "
                        "embeddings, started without our worker extension (docs/servers.md); a server of another "
                        "number format (--dtype) than model.dtype"
                    ) from None
                log.warning("after loading weights, %s; loading once more", wrong)

    async def _load(self) -> None:
        assert self.folder is not None
        self._loads += 1
        if self._settings.sync == "restart":
            await self._restart(self.folder)
        else:
            load = self._engine.load_adapter if self._settings.sync == "lora" else self._engine.load
            await _shaped(load(self.folder, str(self._label)))

    async def _prove(self, before: canary.Expected | None = None) -> None:
        """Raise _WrongWeights unless the server prices the canary as the trainer does, and not as it did `before`."""
        assert self._expected is not None
        await self._check_label()
        reading = await self._retries.ask("scoring the canary", self._read, self._mend)
        self._error = canary.error(reading, self._expected)
        if found := canary.trouble(reading, self._expected, self._policy.dtype):
            raise _WrongWeights(found)
        if before and self._reading and canary.stayed(before, self._expected, self._reading, reading):
            raise _WrongWeights("its log-probabilities of fixed tokens stayed where they were with the old weights")
        self._reading = reading

    async def _check_label(self) -> bool:
        """Return whether the server still goes by the label of its load; raise _WrongWeights where by another."""
        label = await self._retries.ask("asking for the weights' label", self._read_label, self._mend)
        if self._label is None or label is None:
            return False
        if label != self._label:
            raise _WrongWeights(f"it serves weights labelled {label!r} instead of {self._label!r}")
        return True

    async def _prove_still(self) -> None:
        """As `_prove`, after a batch. Only a load can change weights, and it sets a label: that one is enough."""
        if not await self._check_label():
            await self._prove()

    async def _read_label(self) -> str | None:
        return await _shaped(self._engine.label())

    async def _read(self) -> canary.Reading:
        priced = self._settings.behaviour_logprobs == "server"
        ask = Ask(self._canary, 1, Sampling(1), 1, self._policy.eos_ids, priced)
        # One after the other: a failure of one would leave the other behind, and vLLM's CPU engine with --enable-lora
        # dies of a score and a draw in one batch.
        scores = await _shaped(self._engine.score(self._canary))
        draws = await self._complete(ask)
        logprobs = draws[0].logprobs
        return canary.Reading(tuple(scores), draws[0].token_ids[0], logprobs[0] if logprobs else None)

    # Completions

    def start(self, asks: Sequence[Ask], at_once: int) -> Future[list[list[Draw]]]:
        """Begin to sample, `at_once` prompts in flight; the future holds the draws in the order of `asks`."""
        return self._loop.start(self._guarded(lambda: self._sample(asks, at_once)))

    async def _sample(self, asks: Sequence[Ask], at_once: int) -> list[list[Draw]]:
        for _ in range(_ROUNDS):
            loads, slots = self._loads, asyncio.Semaphore(at_once)

            async def draw(ask: Ask, slots: asyncio.Semaphore = slots) -> list[Draw]:
                async with slots:
                    return await self._retries.ask("sampling", lambda: self._complete(ask), self._mend)

            found = await all_of([draw(ask) for ask in asks])
            try:
                await self._prove_still()
            except _WrongWeights as wrong:
                if self._settings.sync == "none" or not self._settings.retry_seconds:
                    raise
                log.warning("after a batch, %s: it gets its weights again, and the batch is drawn again", wrong)
                await self._deliver(None, False)
            if loads == self._loads:
                return found
            self._redraws += 1
        raise ServerFailed(
            f"the server lost its weights during {_ROUNDS} batches in a row: it keeps restarting, or another run loads "
            "its own weights into it"
        )

    async def _complete(self, ask: Ask) -> list[Draw]:
        draws = await _shaped(self._engine.complete(ask))
        check(draws, ask, self.vocabulary)
        return draws

    # Faults

    async def _connect(self) -> str:
        """Learn what is served, and that it gives what training needs."""
        name = await _shaped(self._engine.connect())
        try:
            await self._read()
        except Incapable as lacks:
            raise Refusal(f"{name} cannot be trained with: {lacks}") from None
        return name

    async def _mend(self) -> None:
        """Before a request is repeated: restart a dead server of ours, and give a restarted one its weights again."""
        async with self._mending:
            await self._reconnect()
            if self._label is not None and self._connected:
                label = await self._read_label()
                if label is not None and label != self._label:
                    await self._load()

    async def _reconnect(self) -> None:
        if self._process is not None and not self._process.alive:
            given = self.folder if self._settings.sync != "lora" else None  # an adapter's base is what it starts with
            await self._restart(given or self._process.model)
        await _shaped(self._engine.connect())

    async def _restart(self, model: str | Path) -> None:
        assert self._process is not None
        self._restarts += 1
        self._loads += 1  # what was drawn before may be lost with the connection: the batch is drawn again
        try:
            await asyncio.to_thread(self._process.start, model)
        except ServerFailed as failed:
            raise Fault(str(failed)) from failed

    async def _guarded(self, work: Callable[[], Awaitable[T]]) -> T:
        try:
            return await work()
        except Refusal as refusal:
            raise ServerFailed(f"the server at {self.url} refuses: {refusal}") from refusal
        except _WrongWeights as wrong:
            raise ServerFailed(
                f"the server at {self.url} does not serve the policy (model.train_id): {wrong}"
            ) from None
        except ServerFailed as failed:
            raise ServerFailed(f"the server at {self.url}: {failed}") from failed.__cause__

    # Life

    def metrics(self) -> dict[str, float]:
        """Return what happened since the last call."""
        retries, self._reported_retries = self._retries.count - self._reported_retries, self._retries.count
        found = {
            "server_retries": float(retries),
            "server_redraws": float(self._redraws),
            "server_restarts": float(self._restarts),
            "server_canary_error": self._error,
            "seconds_sync": self._seconds,
        }
        self._redraws = self._restarts = 0
        self._error = self._seconds = 0.0
        return found

    def close(self) -> None:
        """Close connections, end a server of ours, delete the weights written for it."""
        if self._process is not None:
            self._process.close()
        if not self._loop.close(self._engine.client.close):
            log.warning("connections to %s did not close in time", self.url)
        self._weights.close()


async def _shaped(answer: Awaitable[T]) -> T:
    """Await an answer; one whose JSON has not the expected shape (cut, or a proxy's) counts as a fault."""
    try:
        return await answer
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise Fault(f"an answer of unexpected shape ({type(error).__name__}: {error})") from error
