"""Batches of completions that all come from the same weights."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from grpo_mlflow.errors import ServerFailed
from grpo_mlflow.generation.server.delivery import deliver
from grpo_mlflow.generation.server.engine import Ask, Draw
from grpo_mlflow.generation.server.link import Link
from grpo_mlflow.generation.server.proof import Proof, WrongWeights
from grpo_mlflow.runtime.http.client import all_of

_ROUNDS = 5  # how often a batch is repeated because the weights were lost on the way
Told = Callable[[int, Sequence[Draw]], None]
log = logging.getLogger(__name__)


class Batches:
    """Samples batches from one server; `redraws` counts those that were drawn again."""

    def __init__(self, link: Link, proof: Proof) -> None:
        self._link, self._proof = link, proof
        self.redraws = 0

    async def sample(self, asks: Sequence[Ask], at_once: int, told: Told | None = None) -> list[list[Draw]]:
        """Return the draws in the order of `asks`, with `at_once` prompts in flight.

        `told` is called with the number of an ask and its draws as soon as they are there; of a batch that is drawn
        again, again.

        Raises:
            WrongWeights: the server, which is sent no weights, does not serve those that it should.
            ServerFailed: it gives no usable answer, or loses its weights again and again.
        """
        for _ in range(_ROUNDS):
            loads = self._link.loads
            found = await self._draw(asks, at_once, told)
            try:
                await self._proof.prove_still()
            except WrongWeights as wrong:
                if self._link.given is None or not self._link.retries:
                    raise
                log.warning("after a batch, %s: it gets its weights again, and the batch is drawn again", wrong)
                await deliver(self._link, self._proof)
            if loads == self._link.loads:
                return found
            self.redraws += 1
        raise ServerFailed(
            f"the server lost its weights during {_ROUNDS} batches in a row: it keeps restarting, or another run loads "
            "its own weights into it"
        )

    async def _draw(self, asks: Sequence[Ask], at_once: int, told: Told | None) -> list[list[Draw]]:
        slots = asyncio.Semaphore(at_once)

        async def draw(place: int, ask: Ask) -> list[Draw]:
            async with slots:
                draws = await self._link.ask("sampling", lambda: self._link.complete(ask))
            if told is not None:
                told(place, draws)
            return draws

        return await all_of([draw(place, ask) for place, ask in enumerate(asks)])
