"""A server that samples from the policy: weights that provably arrive, faults that cost time and nothing else.

Whatever fails is asked for again with the same seeds, so the rollouts of a run do not depend on what went wrong on the
way; where they cannot be had, the run stops. After each load the server proves that it serves the weights it should
(`proof`), and after its share of each batch that it still does. If it lost them in the middle of it, by a restart, it
gets them again (`link`, `delivery`) and its share is drawn again (`batches`). `fleet` is what several of these are
together.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

from grpo_mlflow.config import GenerationConfig
from grpo_mlflow.errors import ServerAway, ServerFailed, ServerUnfit, redact
from grpo_mlflow.generation.base import Sampling
from grpo_mlflow.generation.server import canary, pricing
from grpo_mlflow.generation.server.delivery import deliver
from grpo_mlflow.generation.server.engine import Ask, Draw, Engine, Incapable, Remedies, shaped
from grpo_mlflow.generation.server.link import Link
from grpo_mlflow.generation.server.process import ServerProcess
from grpo_mlflow.generation.server.proof import Proof, WrongWeights
from grpo_mlflow.generation.server.sync import Package, is_same_model
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.runtime.http.client import Refusal, Unfit

T = TypeVar("T")
Priced = tuple[Ask, list[Draw]]
TEXT = "What is 12 + 34? (x1 OR NOT x2)\n<SOLUTION>01</SOLUTION> naïve 東京"  # to compare tokenizers
log = logging.getLogger(__name__)


class PolicyServer:
    """One server and the policy it is to serve; its methods run in the event loop of the fleet.

    All of them raise `ServerFailed` with the server's address: it gives no usable answer (`ServerAway`), refuses, or
    was started as another than the run needs (`ServerUnfit`).

    Args:
        engine: how to speak to it.
        policy: the trainer's model, whose weights it gets.
        settings: timeouts, retries, who says log-probabilities.
        process: the server, if this run started it.
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
        process: ServerProcess | None = None,
        priced_sampling: Sampling | None = None,
        *,
        source: str | Path | None = None,
        start_command: Callable[[], str] = str,
        complete: Callable[[str], str] = str,
    ) -> None:
        self._engine, self._process = engine, process
        vocabulary: int = policy.model.get_input_embeddings().num_embeddings
        self._link = Link(engine, vocabulary, settings.retry_seconds, process)
        self._proof = Proof(self._link, policy, settings.behaviour_logprobs == "server")
        self._priced_sampling, self._source, self._start_command = priced_sampling, source, start_command
        self._complete = complete
        self._known = float("-inf")  # the events up to which its log-probabilities are known to be right
        self._said_why = False  # its tokenizer was not checked
        self._reported_retries = 0
        self.pace, self.redraws = 1.0, 0
        self.price_gap: float | None = None  # of its log-probabilities from the trainer's, when they were checked last

    @property
    def url(self) -> str:
        return self._engine.client.root

    @property
    def remedies(self) -> Remedies:
        """What a person can do about a server of this kind."""
        return self._engine.remedies

    @property
    def loads(self) -> int:
        return self._link.loads

    @property
    def failing(self) -> bool:
        return self._link.failing

    @property
    def retried(self) -> int:
        return self._link.retried

    @property
    def patient(self) -> bool:
        return self._link.retries

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

    # Before the first weights

    async def start(self) -> None:
        """Start the server if the run is to do so."""
        if self._process is not None:
            await asyncio.to_thread(self._process.start, self._process.model)

    async def connect(self) -> str:
        """Make sure that the server gives what training needs, and return its name for what it serves."""
        return await self._addressed(lambda: self._link.connect(self._connect))

    async def check_tokenizer(self, ours: Sequence[int]) -> int:
        """Return the number of tokens of `TEXT`, which the server must split as the trainer does.

        0 where it does not tokenize, which is no fault: only token ids are exchanged. A line says so once.
        """
        theirs = await self._addressed(lambda: self._link.ask("tokenizing", self._tokenize))
        if theirs is None:
            return 0
        if [*ours] != theirs:
            pairs = zip(ours, theirs, strict=False)
            place = next((i for i, pair in enumerate(pairs) if pair[0] != pair[1]), min(len(ours), len(theirs)))
            found = (
                f"the tokenizer of the server at {self.url} differs from the trainer's at token {place} of a test text"
            )
            raise ServerUnfit(found, f"It has to serve the very model of model.train_id. {self.remedy()}")
        return len(ours)

    async def has_them(self, name: str) -> bool:
        """Return whether a server that serves `name` has the weights of a policy that is not trained, without a load.

        Scores alone do not tell a model from one that was trained a little further; so it must have been started with
        the very same, and have no endpoints through which another run could have loaded weights since.
        """
        return await self._addressed(lambda: self._has_them(name))

    async def require_loads(self, tied: bool) -> None:
        """Make sure that it can load whole weights in place; `tied`: the output layer is the embedding."""
        await self._addressed(lambda: self._link.ask("connecting", lambda: self._engine.require_loads(tied)))

    # Weights

    def expect(self, expected: canary.Expected) -> None:
        """Let the server score `canary.tokens` like this from the next proof on."""
        self._proof.expect(expected)

    def give(self, package: Package | None) -> None:
        """Let the server have these weights (None: those of its start) from `take` on."""
        self._link.given = package

    async def take(self, is_there: bool = False) -> None:
        """Load what was given last and prove it; `is_there`: the server started with that."""

        async def given() -> None:
            if self._link.given is None:
                await self._proof.prove()
            else:
                await deliver(self._link, self._proof, is_there)

        await self._addressed(given)

    async def priced(self, policy: Policy) -> Priced | None:
        """Return a few tokens with log-probabilities, drawn as the run draws, and what was asked for.

        That is for `believe`, at first and where it may have been started again since then: a request failed, or
        there was more than the one load of new weights. Else None.
        """
        if self._priced_sampling is None or self._link.events <= self._known + 1:
            self._known = self._link.events
            return None
        ask = pricing.question(policy, self._priced_sampling)
        return ask, await self._addressed(
            lambda: self._link.ask("drawing a few tokens", lambda: self._link.complete(ask))
        )

    def believe(self, policy: Policy, priced: Priced) -> None:
        """Check what `priced` returned; `policy` has the weights that the server has."""
        try:
            self.price_gap = pricing.check(policy, *priced)
        except pricing.WrongLogprobs as wrong:
            remedy = self.remedy("generation.behaviour_logprobs=recompute")
            raise pricing.WrongLogprobs(f"the server at {self.url}: {wrong}", remedy) from None
        self._known, self._link.priced = self._link.events, self._priced_sampling

    # Batches

    async def draw(self, ask: Ask) -> list[Draw]:
        return await self._addressed(lambda: self._link.ask("sampling", lambda: self._link.complete(ask)))

    async def still_proven(self, loads: int) -> bool:
        """Let it prove its weights again; return whether what it drew since it had counted `loads` is from them."""

        async def proven() -> None:
            try:
                await self._proof.prove_still()
            except WrongWeights as wrong:
                if self._link.given is None or not self._link.retries:
                    raise
                log.warning("after a batch, %s: it gets its weights again, and the batch is drawn again", wrong)
                await deliver(self._link, self._proof)

        await self._addressed(proven)
        return loads == self._link.loads

    async def recover(self) -> None:
        """Bring it back if it fails, and with it the weights that it is to have."""
        await self._addressed(self._link.recover)

    async def rest(self) -> None:
        """Put the server to sleep until it is next asked."""
        await self._addressed(self._link.rest)

    # Its end

    def metrics(self) -> dict[str, float]:
        """Return what happened since the last call."""
        retries, self._reported_retries = self._link.retried - self._reported_retries, self._link.retried
        found = {
            "server_retries": float(retries),
            "server_redraws": float(self.redraws),
            "server_restarts": float(self._link.restarts),
            "server_canary_error": self._proof.error,
        }
        self.redraws = self._link.restarts = 0
        self._proof.error = 0.0
        return found

    def end(self) -> None:
        """End a server of ours."""
        if self._process is not None:
            self._process.close()

    async def disconnect(self) -> None:
        await self._engine.client.close()

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
            return await shaped(self._engine.tokenize(TEXT))
        except Refusal as refusal:
            if not self._said_why:
                self._said_why = True
                log.warning("the tokenizer of the server at %s was not checked: %s", redact(self.url), refusal)
            return None

    async def _has_them(self, name: str) -> bool:
        if self._source is None or not is_same_model(name, self._source) or await self._link.label() is not None:
            return False
        try:
            await self._proof.prove()
        except WrongWeights:
            return False
        return True

    async def _addressed(self, work: Callable[[], Awaitable[T]]) -> T:
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
            kind = ServerAway if isinstance(failed, ServerAway) else ServerFailed
            raise kind(f"the server at {self.url}: {failed}") from failed.__cause__
