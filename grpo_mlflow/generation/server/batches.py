"""Batches of completions that several servers draw, all from the same weights.

Prompts wait in one queue, from which the least loaded server takes the next. Where none waits, a server without work
draws those again that another holds up because it is slow or away: the seeds are the same, so whichever has it first
gives what the other would. A server proves its weights when it has nothing in flight; only then what it drew counts,
and if it lost them on the way, it draws that again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TypeVar

from grpo_mlflow.errors import ServerAway, ServerFailed, redact
from grpo_mlflow.generation.server.engine import Ask, Draw
from grpo_mlflow.generation.server.seats import Drawing, Seat, choose

_ROUNDS = 5  # how often a server draws again because it lost its weights on the way
_LOOK = 0.1  # seconds between two looks at what holds a batch up
S = TypeVar("S", bound=Drawing)
Told = Callable[[int, Sequence[Draw]], None]
log = logging.getLogger(__name__)


async def sample(
    servers: Sequence[S],
    asks: Sequence[Ask],
    at_once: int,
    told: Told | None = None,
    opening: Mapping[S, asyncio.Future[bool]] | None = None,
) -> list[list[Draw]]:
    """Return the draws in the order of `asks`, with `at_once` prompts in flight at each server.

    `told` is called with the number of an ask and its draws as soon as they are there; of what is drawn again, again.
    `opening` is what has to end before a server can take a prompt.

    Raises:
        ServerUnfit: a server, which is sent no weights, does not serve those that it should.
        ServerFailed: one of them refuses or loses its weights again and again, or none gives a usable answer.
    """
    batch = _Batch([(server, (opening or {}).get(server)) for server in servers], asks, at_once, told)
    try:
        return await batch.run()
    finally:
        await batch.close()


class _Batch:
    def __init__(
        self,
        servers: Sequence[tuple[Drawing, asyncio.Future[bool] | None]],
        asks: Sequence[Ask],
        at_once: int,
        told: Told | None,
    ) -> None:
        self._asks, self._at_once, self._told = asks, at_once, told
        self._waiting = deque(range(len(asks)))
        self._found: dict[int, list[Draw]] = {}
        self._news = asyncio.Event()
        self._seats = [Seat(server, self._news.set, opening) for server, opening in servers]

    async def run(self) -> list[list[Draw]]:
        while len(self._found) < len(self._asks):
            self._hand_out()
            for seat in self._seats:
                if seat.work is None and not seat.busy:
                    if seat.drawn:
                        seat.prove()
                    elif seat.server.failing:
                        seat.recover()
            await self._something_new()
            for seat in self._seats:
                self._collect(seat)
        return [self._found[place] for place in range(len(self._asks))]

    async def close(self) -> None:
        for seat in self._seats:
            await seat.leave()
        if len(self._found) == len(self._asks):
            known = [seconds for seat in self._seats if (seconds := seat.mean_seconds) is not None]
            for seat in self._seats if known else ():
                seat.learn(max(min(known), 1e-6))

    async def _something_new(self) -> None:
        looks = len(self._seats) > 1  # there is nobody to take over from otherwise
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._news.wait(), _LOOK if looks else None)
        self._news.clear()

    def _hand_out(self) -> None:
        """Give prompts to servers that can take some."""
        ready = [seat for seat in self._seats if seat.work is None]
        ready = [seat for seat in ready if seat.is_well] or ready
        while self._waiting and (seat := choose(ready, len(self._waiting), self._at_once)) is not None:
            place = self._waiting.popleft()
            seat.draw(place, self._asks[place])
        if not self._waiting:
            for seat in ready:
                for place in self._held_up(seat)[: self._at_once - seat.busy]:
                    seat.draw(place, self._asks[place])
        for seat in ready:
            if seat.is_untried and (places := self._newest(seat)):
                seat.draw(places[-1], self._asks[places[-1]])  # for its pace alone: nobody waits for it

    def _newest(self, seat: Seat) -> list[int]:
        """Return what each other server began last, of prompts that this one does not have."""
        newest = (other.newest for other in self._seats if other is not seat)
        return [place for place in newest if place is not None and place not in seat.places]

    def _held_up(self, seat: Seat) -> list[int]:
        """Return the prompts that this server had better draw, too."""
        if not seat.is_well:
            return []
        others = [each for each in self._seats if each is not seat]
        places = dict.fromkeys(place for other in others for place in other.places if place not in seat.places)
        return [
            place
            for place in places
            if all(other.holds_up(place, seat.patience) for other in others if place in other.places)
        ]

    def _collect(self, seat: Seat) -> None:
        """Take what a server has done since the last look."""
        away: ServerAway | None = None
        for place, task in seat.ended():
            try:
                seat.drawn[place] = task.result()
            except ServerAway as failed:
                away, seat.gave_up = failed, True
                self._release(place)
                continue
            seat.gave_up = False
            if self._told is not None:
                self._told(place, seat.drawn[place])
        if seat.work is not None and seat.work.done():
            work, seat.work = seat.work, None
            try:
                if work.result():
                    self._keep(seat)
                else:
                    self._lost(seat)
                seat.gave_up = False
            except ServerAway as failed:
                away, seat.gave_up = failed, True
        if away is not None:
            if not seat.server.patient or all(each.gave_up for each in self._seats):
                raise away
            log.warning("%s; the run goes on with the other servers", redact(str(away)))
            self._put_back(seat)

    def _keep(self, seat: Seat) -> None:
        """Count what a server has drawn and proven."""
        for place, draws in {**seat.drawn}.items():
            self._found[place] = draws
            for each in self._seats:
                each.drop(place)

    def _lost(self, seat: Seat) -> None:
        seat.losses += 1
        seat.server.redraws += 1
        if seat.losses == _ROUNDS:
            raise ServerFailed(
                f"the server at {seat.server.url}: the server lost its weights during {_ROUNDS} batches in a row: it "
                "keeps restarting, or another run loads its own weights into it"
            )
        self._put_back(seat)

    def _put_back(self, seat: Seat) -> None:
        """Let a server give up what it draws or has drawn."""
        for place in [*seat.places]:
            seat.drop(place)
            self._release(place)

    def _release(self, place: int) -> None:
        """Let a prompt that a server has given up wait again, but if another one has it as well."""
        if not any(place in seat.places for seat in self._seats):
            self._waiting.append(place)
