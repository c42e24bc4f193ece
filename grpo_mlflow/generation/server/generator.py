"""The generator whose completions come from a server."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import Future, TimeoutError
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from grpo_mlflow import seeding
from grpo_mlflow.errors import ServerFailed
from grpo_mlflow.generation.base import Drawn, Sampling, work
from grpo_mlflow.generation.server.batches import Told
from grpo_mlflow.generation.server.copies import copied
from grpo_mlflow.generation.server.engine import Ask, Draw
from grpo_mlflow.generation.server.recompute import behaviour_logprobs, behaviour_logprobs_together
from grpo_mlflow.generation.server.servers import Servers
from grpo_mlflow.model import sharding
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.runtime.pace import Pace
from grpo_mlflow.types import Completion, Prompt

S = TypeVar("S", bound=Servers)


@dataclass(frozen=True, slots=True)
class _Begun:
    """Completions that a server is sampling."""

    generator: ServerGenerator[Any]
    asks: tuple[Ask, ...]
    version: int
    draws: Future[list[list[Draw]]]
    pace: Pace
    drawn: list[int]  # the numbers of the prompts whose completions are there

    def result(self) -> list[list[Completion]]:
        """Wait for all; whatever interrupts the wait cancels the requests."""
        try:
            found = self._waited()
        except BaseException:
            self.cancel()
            raise
        return [self.generator.completions(a, d, self.version) for a, d in zip(self.asks, found, strict=True)]

    def _waited(self) -> list[list[Draw]]:
        while True:
            try:
                return self.draws.result(max(0.1, self.pace.wait()))
            except TimeoutError:
                if self.draws.done():  # it is the server's
                    raise
                self.pace.at(len({*self.drawn}) / max(1, len(self.asks)))  # of several processes one may have none

    def succeeded(self) -> bool:
        return self.draws.done() and not self.draws.cancelled() and self.draws.exception() is None

    def cancel(self) -> None:
        self.draws.cancel()


class ServerGenerator(Generic[S]):
    """Draws from servers, `batch_size` prompts in flight at each. Several generators may share the servers.

    Args:
        server: those servers, as one.
        policy: the trainer's model.
        batch_size: prompts in flight at each server.
        pricing: returns the model of the weights that the server has, for log-probabilities of our own; None: the
            server says them.
        pace: is told how far it is.
    """

    def __init__(
        self,
        server: S,
        policy: Policy,
        batch_size: int,
        pricing: Callable[[], Policy] | None,
        *,
        pace: Pace | None = None,
    ) -> None:
        self.server, self._policy, self._batch_size, self._pricing = server, policy, batch_size, pricing
        self._pace = pace or Pace(lambda _: None)

    def at(self, server: S) -> ServerGenerator[S]:
        """Return a generator like this one that draws from other servers."""
        found = copy.copy(self)
        found.server = server
        return found

    def sync(self, version: int) -> None:
        self.server.sync(version)

    def metrics(self) -> dict[str, float]:
        return self.server.metrics()

    def rest(self) -> None:
        self.server.rest()

    def generate(
        self, prompts: Sequence[Prompt], k: int, sampling: Sampling, seed: int, key: tuple[str | int, ...]
    ) -> list[list[Completion]]:
        return self.begin(prompts, k, sampling, seed, key).result()

    def tell(
        self,
        prompts: Sequence[Prompt],
        k: int,
        sampling: Sampling,
        seed: int,
        key: tuple[str | int, ...],
        *,
        drawn: Drawn,
    ) -> list[list[Completion]]:
        """Sample as `generate` does, and tell what is drawn for each prompt."""

        def told(place: int, draws: Sequence[Draw]) -> None:
            ids = [draw.token_ids for draw in draws]
            drawn(place, list(zip(ids, self._policy.decode(ids), strict=True)))

        return self.begin(prompts, k, sampling, seed, key, told=told).result()

    def begin(
        self,
        prompts: Sequence[Prompt],
        k: int,
        sampling: Sampling,
        seed: int,
        key: tuple[str | int, ...],
        *,
        told: Told | None = None,
    ) -> _Begun:
        """Begin to sample as `generate` would, with the weights that the server has now (`told`: `Batches.sample`)."""
        asks = tuple(
            Ask(
                token_ids=prompt.token_ids,
                k=k,
                sampling=sampling,
                seed=seeding.integer(seed, *key, prompt.problem_id) >> 1,  # leaves room for the replicate's number
                stop_ids=self._policy.eos_ids,
                logprobs=self._pricing is None,
            )
            for prompt in prompts
        )
        assert self.server.version is not None, "sync first"
        there = list[int]()

        def noted(place: int, draws: Sequence[Draw]) -> None:
            there.append(place)
            if told is not None:
                told(place, draws)

        self._pace.begin(work(key))
        draws = self.server.start(asks, self._batch_size, noted)
        return _Begun(self, asks, self.server.version, draws, self._pace, there)

    def completions(self, ask: Ask, draws: Sequence[Draw], version: int) -> list[Completion]:
        """Return one prompt's draws as completions, with text decoded from the token ids.

        Raises:
            ServerFailed: the server gave one draw several times.
        """
        ids = [draw.token_ids for draw in draws]
        logprobs = [draw.logprobs or () for draw in draws]
        if self._pricing is not None and not self.prices_together():
            logprobs = behaviour_logprobs(self._pricing(), ask.token_ids, ids, ask.sampling)
            self.require_drawn_apart(ids, logprobs, ask.sampling)
        return [
            Completion(
                token_ids=tokens,
                text=text,
                behaviour_logprobs=values,
                finish_reason="stop" if tokens[-1] in ask.stop_ids else "length",
                policy_version=version,
            )
            for tokens, values, text in zip(ids, logprobs, self._policy.decode(ids), strict=True)
        ]

    def prices_together(self) -> bool:
        """See `Pricing`."""
        return self._pricing is not None and sharding.is_sharded(self._pricing().model)

    def prices(
        self, asked: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]], sampling: Sampling
    ) -> list[list[tuple[float, ...]]]:
        """See `Pricing`."""
        assert self._pricing is not None
        return behaviour_logprobs_together(self._pricing(), asked, sampling)

    def require_drawn_apart(
        self, completions: Sequence[tuple[int, ...]], logprobs: Sequence[Sequence[float]], sampling: Sampling
    ) -> None:
        """See `Pricing`."""
        if sampling.temperature and (found := copied(completions, logprobs)):
            raise ServerFailed(f"the server at {self.server.url}: {found}")
