"""A server that samples from the policy: weights that provably arrive, faults that cost time and nothing else.

Whatever fails is asked for again with the same seeds, so the rollouts of a run do not depend on what went wrong on the
way; where they cannot be had, the run stops. After each load the server proves that it serves the weights it should
(`proof`), and after each batch that it still does. If it lost them in the middle of a batch, by a restart, it gets them
again (`link`, `delivery`) and the whole batch is drawn again (`batches`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from grpo_mlflow.config import GenerationConfig
from grpo_mlflow.errors import ServerFailed
from grpo_mlflow.generation.base import Sampling
from grpo_mlflow.generation.server import canary, pricing
from grpo_mlflow.generation.server.batches import Batches
from grpo_mlflow.generation.server.client import Loop, Refusal
from grpo_mlflow.generation.server.delivery import deliver
from grpo_mlflow.generation.server.engine import Ask, Draw, Engine, Incapable, Remedies, shaped
from grpo_mlflow.generation.server.link import Link
from grpo_mlflow.generation.server.process import ServerProcess
from grpo_mlflow.generation.server.proof import Proof, WrongWeights
from grpo_mlflow.generation.server.sync import SYNCS
from grpo_mlflow.generation.server.weights import WeightsFolder
from grpo_mlflow.model.policy import Policy

T = TypeVar("T")
log = logging.getLogger(__name__)


class PolicyServer:
    """One server and the policy it is to serve. `version` is the one that it serves, None before the first sync.

    Args:
        engine: how to speak to it.
        policy: the trainer's model, whose weights it gets.
        settings: sync, timeouts, retries.
        initial: loads the policy of version 0, which a server that is sent no weights keeps serving.
        process: the server, if this run started it, with what `sync.Sync.starts_with` says.
        priced_sampling: how completions are drawn whose log-probabilities are trained on; None: there are none such.
    """

    def __init__(
        self,
        engine: Engine,
        policy: Policy,
        settings: GenerationConfig,
        initial: Callable[[], Policy],
        process: ServerProcess | None = None,
        priced_sampling: Sampling | None = None,
    ) -> None:
        self._engine, self._policy, self._initial, self._process = engine, policy, initial, process
        self._sync, self._weights = SYNCS[settings.sync], WeightsFolder(settings.sync_dir)
        vocabulary: int = policy.model.get_input_embeddings().num_embeddings
        self._link = Link(engine, vocabulary, settings.retry_seconds, process)
        self._proof = Proof(self._link, policy, settings.behaviour_logprobs == "server")
        self._batches = Batches(self._link, self._proof)
        self._priced_sampling = priced_sampling
        self._loads = -1  # that were known when the server's log-probabilities were last checked
        self._loop = Loop()
        self.version: int | None = None
        self._reported_retries, self._seconds = 0, 0.0

    @property
    def url(self) -> str:
        return self._engine.client.root

    @property
    def remedies(self) -> Remedies:
        """What a person can do about a server of this kind."""
        return self._engine.remedies

    @property
    def folder(self) -> Path | None:
        """The weights that the server was last given."""
        return self._weights.newest

    def connect(self) -> str:
        """Make sure that the server gives what training needs, and return its name for what it serves.

        Raises:
            ServerFailed: it cannot be reached, or lacks something.
        """
        return self._run(lambda: self._link.ask("connecting", self._connect))

    def tokenize(self, text: str) -> list[int]:
        """Return the server's tokens of a text."""
        return self._run(lambda: self._link.ask("tokenizing", lambda: shaped(self._engine.tokenize(text))))

    def sync(self, version: int) -> None:
        """Let the server serve the policy's weights, those after `version` iterations, and prove it.

        Raises:
            ServerFailed: it cannot be reached, cannot load them, or serves something else afterwards.
        """
        wanted = version if self._sync.sends else 0
        if wanted == self.version:
            return
        began = time.perf_counter()
        if self.version is None:
            self.connect()
        policy = self._policy if wanted == version else self._initial()
        before = self._proof.expect(policy)
        self._link.given = self._sync.pack(self._policy, self._weights, version)
        self._run(lambda: self._give(before))
        self.version = wanted
        self._check_logprobs(policy)
        self._seconds += time.perf_counter() - began

    def _check_logprobs(self, policy: Policy) -> None:
        """Check how the server prices what it draws, at first and where it may have been started again since.

        Raises:
            ServerFailed: not as the run needs it.
        """
        known, self._loads = self._loads, self._link.loads
        if self._priced_sampling is None or (known >= 0 and self._link.loads <= known + 1):
            return
        ask = pricing.question(policy, self._priced_sampling)
        draws = self._run(lambda: self._link.ask("drawing a few tokens", lambda: self._link.complete(ask)))
        ways = [self.remedies.logprobs, "set generation.behaviour_logprobs=recompute"]
        try:
            pricing.check(policy, ask, draws, f"To mend it, {' or '.join(filter(None, ways))}")
        except pricing.WrongLogprobs as wrong:
            raise pricing.WrongLogprobs(f"the server at {self.url}: {wrong}") from None

    def start(self, asks: Sequence[Ask], at_once: int) -> Future[list[list[Draw]]]:
        """Begin to sample, `at_once` prompts in flight; the future holds the draws in the order of `asks`."""
        return self._loop.start(self._with_address(lambda: self._batches.sample(asks, at_once)))

    def metrics(self) -> dict[str, float]:
        """Return what happened since the last call."""
        retries, self._reported_retries = self._link.retried - self._reported_retries, self._link.retried
        found = {
            "server_retries": float(retries),
            "server_redraws": float(self._batches.redraws),
            "server_restarts": float(self._link.restarts),
            "server_canary_error": self._proof.error,
            "seconds_sync": self._seconds,
        }
        self._batches.redraws = self._link.restarts = 0
        self._proof.error = self._seconds = 0.0
        return found

    def close(self) -> None:
        """Close connections, end a server of ours, delete the weights written for it."""
        if self._process is not None:
            self._process.close()
        if not self._loop.close(self._engine.client.close):
            log.warning("connections to %s did not close in time", self.url)
        self._weights.close()

    async def _connect(self) -> str:
        """Learn what is served, and that it gives what training needs."""
        name = await shaped(self._engine.connect())
        try:
            await self._proof.read()
        except Incapable as lacks:
            raise Refusal(f"{name} cannot be trained with: {lacks}") from None
        return name

    async def _give(self, before: canary.Expected | None) -> None:
        if self._link.given is None:
            await self._proof.prove()
        else:
            is_there = self.version is None and self._sync.is_there_at_start(self._policy)
            await deliver(self._link, self._proof, before, is_there)

    def _run(self, work: Callable[[], Awaitable[T]]) -> T:
        return self._loop.run(self._with_address(work))

    async def _with_address(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do the work; errors name the server's address."""
        try:
            return await work()
        except Refusal as refusal:
            raise ServerFailed(f"the server at {self.url} refuses: {refusal}") from refusal
        except WrongWeights as wrong:
            raise ServerFailed(
                f"the server at {self.url} does not serve the policy (model.train_id): {wrong}"
            ) from None
        except ServerFailed as failed:
            raise ServerFailed(f"the server at {self.url}: {failed}") from failed.__cause__
