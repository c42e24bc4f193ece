"""A server that samples from the policy: weights that provably arrive, faults that cost time and nothing else.

Whatever fails is asked for again with the same seeds, so the rollouts of a run do not depend on what went wrong on the
way; where they cannot be had, the run stops. After each load the server proves that it serves the weights it should
(`proof`), and after each batch that it still does. If it lost them in the middle of a batch, by a restart, it gets them
again (`link`, `delivery`) and the whole batch is drawn again (`batches`).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from grpo_mlflow.config import GenerationConfig
from grpo_mlflow.errors import ServerFailed, ServerUnfit, redact
from grpo_mlflow.generation.base import Sampling
from grpo_mlflow.generation.server import canary, pricing
from grpo_mlflow.generation.server.batches import Batches, Told
from grpo_mlflow.generation.server.delivery import deliver
from grpo_mlflow.generation.server.engine import Ask, Draw, Engine, Incapable, Remedies, shaped
from grpo_mlflow.generation.server.link import Link
from grpo_mlflow.generation.server.process import ServerProcess
from grpo_mlflow.generation.server.proof import Proof, WrongWeights
from grpo_mlflow.generation.server.sync import SYNCS
from grpo_mlflow.generation.server.weights import WeightsFolder
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.runtime.http.client import Loop, Refusal, Unfit

T = TypeVar("T")
_TEXT = "What is 12 + 34? (x1 OR NOT x2)\n<SOLUTION>01</SOLUTION> naïve 東京"
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
        source: what the policy was loaded from, if it is not trained: a server started with that has its weights.
        start_command: returns the shell command that starts the right server.
        complete: returns settings that do without something, with what the run's own need beside them; empty: none do.
    """

    def __init__(
        self,
        engine: Engine,
        policy: Policy,
        settings: GenerationConfig,
        initial: Callable[[], Policy],
        process: ServerProcess | None = None,
        priced_sampling: Sampling | None = None,
        *,
        source: str | Path | None = None,
        start_command: Callable[[], str] = str,
        complete: Callable[[str], str] = str,
    ) -> None:
        self._engine, self._policy, self._initial, self._process = engine, policy, initial, process
        self._sync, self._weights = SYNCS[settings.sync], WeightsFolder(settings.sync_dir)
        vocabulary: int = policy.model.get_input_embeddings().num_embeddings
        self._link = Link(engine, vocabulary, settings.retry_seconds, process)
        self._proof = Proof(self._link, policy, settings.behaviour_logprobs == "server")
        self._batches = Batches(self._link, self._proof)
        self._priced_sampling, self._source, self._start_command = priced_sampling, source, start_command
        self._complete = complete
        self._loads = -1  # that were known when the server's log-probabilities were last checked
        self._said_why = False  # its tokenizer was not checked
        self._loop = Loop()
        self.version: int | None = None
        self._reported_retries, self._seconds = 0, 0.0
        self.price_gap: float | None = None  # of its log-probabilities from the trainer's, when they were checked last

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
        return self._run(lambda: self._link.connect(self._connect))

    def check_tokenizer(self) -> int:
        """Return the number of tokens of a test text, which the server must split as the trainer does.

        0 where it does not tokenize, which is no fault: only token ids are exchanged. A line says so once.

        Raises:
            ServerFailed: it gives no usable answer, or differs.
        """
        ours: list[int] = self._policy.tokenizer(_TEXT, add_special_tokens=False).input_ids
        theirs = self._run(lambda: self._link.ask("tokenizing", self._tokenize))
        if theirs is None:
            return 0
        if ours != theirs:
            pairs = zip(ours, theirs, strict=False)
            place = next((i for i, pair in enumerate(pairs) if pair[0] != pair[1]), min(len(ours), len(theirs)))
            found = (
                f"the tokenizer of the server at {self.url} differs from the trainer's at token {place} of a test text"
            )
            raise ServerUnfit(found, f"It has to serve the very model of model.train_id. {self.remedy()}")
        return len(ours)

    def sync(self, version: int) -> None:
        """Let the server serve the policy's weights, those after `version` iterations, and prove it.

        Raises:
            ServerFailed: it cannot be reached, cannot load them, or serves something else afterwards; as `ServerUnfit`
                where another start of the server mends it.
        """
        wanted = version if self._sync.sends else 0
        if wanted == self.version:
            return
        began = time.perf_counter()
        name = "" if self.version is not None else self.connect()
        if name:
            self.check_tokenizer()
        policy = self._policy if wanted == version else self._initial()
        before = self._proof.expect(policy)
        if not (name and self._run(lambda: self._has_them(name))):
            if name and self._sync.in_place:
                tied = bool(getattr(self._policy.model.config, "tie_word_embeddings", False))
                self._run(lambda: self._link.ask("connecting", lambda: self._engine.require_loads(tied)))
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
        try:
            self.price_gap = pricing.check(policy, ask, draws)
        except pricing.WrongLogprobs as wrong:
            remedy = self.remedy("generation.behaviour_logprobs=recompute")
            raise pricing.WrongLogprobs(f"the server at {self.url}: {wrong}", remedy) from None
        self._link.priced = self._priced_sampling

    def remedy(self, instead: str = "") -> str:
        """Return a sentence that ends with the command that starts the right server, or settings `instead` of that.

        Those are completed for the run's own; where it takes none, they are left out.
        """
        command = self._start_command()
        if not command:
            return ""
        settings = self._complete(instead) if instead else ""
        choice = f", or choose {settings}" if settings else ""
        if self._process is not None:
            return f"The run starts it with this command, which generation.server.* change{choice}: {command}"
        return f"Start it again with this command{choice}: {command}"

    def start(self, asks: Sequence[Ask], at_once: int, told: Told | None = None) -> Future[list[list[Draw]]]:
        """Begin to sample, `at_once` prompts in flight; the future holds the draws in the order of `asks`.

        `told` is as in `Batches.sample`, and called in another thread.
        """
        return self._loop.start(self._with_address(lambda: self._batches.sample(asks, at_once, told)))

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
        name = "what it serves"
        try:
            name = await shaped(self._engine.connect())
            if (count := len(await shaped(self._engine.complete(self._proof.pair)))) != self._proof.pair.k:
                raise Incapable(f"it gives {count} completions of a prompt where {self._proof.pair.k} are asked for")
            await self._proof.read()
        except Incapable as lacks:
            told = f"{name} cannot be sampled from: {lacks}"
            raise (Unfit(told, lacks.instead) if lacks.instead else Refusal(told)) from None
        return name

    async def _tokenize(self) -> list[int] | None:
        """Return the server's tokens of the test text, None where it (or a gateway before it) has no such endpoint."""
        try:
            return await shaped(self._engine.tokenize(_TEXT))
        except Refusal as refusal:
            if not self._said_why:
                self._said_why = True
                log.warning("the tokenizer of the server at %s was not checked: %s", redact(self.url), refusal)
            return None

    async def _has_them(self, name: str) -> bool:
        """Return whether a server that serves `name` has the weights of a policy that is not trained, without a load.

        Scores alone do not tell a model from one that was trained a little further; so it must have been started with
        the very same, and have no endpoints through which another run could have loaded weights since.
        """
        if self._source is None or not _same(name, self._source) or await self._link.label() is not None:
            return False
        try:
            await self._proof.prove()
        except WrongWeights:
            return False
        return True

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
        except Unfit as unfit:
            raise ServerUnfit(f"the server at {self.url}: {unfit}", self.remedy(unfit.instead)) from unfit
        except Refusal as refusal:
            raise ServerFailed(f"the server at {self.url} refuses: {refusal}") from refusal
        except WrongWeights as wrong:
            found = f"the server at {self.url} does not serve the policy (model.train_id): {wrong}"
            raise ServerUnfit(found, self.remedy()) from None
        except ServerFailed as failed:
            raise ServerFailed(f"the server at {self.url}: {failed}") from failed.__cause__


def _same(name: str, source: str | Path) -> bool:
    """Return whether a server that names a model so was started with `source`, a hub id or a folder here."""
    return name == str(source) or (os.path.isdir(name) and os.path.isdir(source) and os.path.samefile(name, source))
