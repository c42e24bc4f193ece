"""A server's part in a batch: what it draws, what it has drawn and not proven yet, and how fast it is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

from grpo_mlflow.generation.server.engine import Ask, Draw

_PATIENCE = 1.5  # times the slowest prompt that a server had itself, after which it takes over another's
_SLOW = 1.5  # times the pace of the fastest server


class Drawing(Protocol):
    """What a batch asks of one server."""

    pace: float  # of its prompts in earlier batches, as a multiple of the fastest server's
    redraws: int

    @property
    def patient(self) -> bool:
        """Whether what fails is asked for again."""
        ...

    @property
    def url(self) -> str: ...

    @property
    def loads(self) -> int:
        """How often something happened that may have changed its weights."""
        ...

    @property
    def failing(self) -> bool:
        """Whether a request has failed, and none was answered since."""
        ...

    @property
    def retried(self) -> int:
        """How often a request was repeated."""
        ...

    async def draw(self, ask: Ask) -> list[Draw]: ...

    async def still_proven(self, loads: int) -> bool:
        """Let it prove its weights again; return whether what it drew since it had counted `loads` is from them."""
        ...

    async def recover(self) -> None: ...


class Seat:
    """One server's part in one batch.

    `work` is what it does apart from drawing; meanwhile it takes no prompts. It returns whether what was drawn before
    is from the right weights.

    Args:
        server: that server.
        news: called when something has ended.
        opening: what has to end before it can take a prompt.
    """

    def __init__(self, server: Drawing, news: Callable[[], None], opening: asyncio.Future[bool] | None = None) -> None:
        self.server, self._news = server, news
        self._drawing: dict[int, tuple[asyncio.Task[list[Draw]], float]] = {}
        self.drawn: dict[int, list[Draw]] = {}
        self.work: asyncio.Future[bool] | None = None
        self.losses = 0
        self.gave_up = False  # its server did not answer for as long as it may, and not since
        self._loads, self._retried = server.loads, server.retried
        self._seconds, self._cut_off = list[float](), list[float]()  # of prompts that it drew, and that it did not
        self._dropped = set[asyncio.Future[list[Draw]]]()
        if opening is not None:
            self.do(opening)

    @property
    def busy(self) -> int:
        """How many prompts are in flight at it."""
        return len(self._drawing)

    @property
    def places(self) -> Collection[int]:
        """The prompts that it draws or has drawn."""
        return self._drawing.keys() | self.drawn.keys()

    @property
    def is_well(self) -> bool:
        """Whether its server answers, as far as is known."""
        return not self.server.failing

    @property
    def patience(self) -> float:
        """How long another server may take for a prompt before this one draws it, too, in seconds."""
        return _PATIENCE * max(self._seconds) if self._seconds else float("inf")

    @property
    def is_untried(self) -> bool:
        """Whether it was slow before, and nothing of this batch has told yet whether it still is."""
        return self.server.pace > _SLOW and not (self._drawing or self._seconds or self._cut_off)

    @property
    def newest(self) -> int | None:
        """The prompt that it began last, of those in flight."""
        return next(reversed(self._drawing), None)

    def draw(self, place: int, ask: Ask) -> None:
        """Begin to draw a prompt."""
        if not self._drawing and not self.drawn:
            self._loads = self.server.loads
        task = asyncio.ensure_future(self.server.draw(ask))
        task.add_done_callback(lambda _: self._news())
        self._drawing[place] = task, time.monotonic()

    def do(self, work: asyncio.Future[bool]) -> None:
        """Wait for the end of other work before it takes prompts again."""
        self.work = work
        work.add_done_callback(lambda _: self._news())

    def prove(self) -> None:
        self.do(asyncio.ensure_future(self.server.still_proven(self._loads)))

    def recover(self) -> None:
        async def recovered() -> bool:
            await self.server.recover()
            return True

        self.do(asyncio.ensure_future(recovered()))

    def ended(self) -> list[tuple[int, asyncio.Task[list[Draw]]]]:
        """Return the prompts whose drawing has ended, however, each once."""
        found = [(place, task) for place, (task, _) in self._drawing.items() if task.done()]
        for place, _ in found:
            self._seconds.append(time.monotonic() - self._drawing.pop(place)[1])
        return found

    def drop(self, place: int) -> None:
        """Draw a prompt no longer, and forget what was drawn for it."""
        self.drawn.pop(place, None)
        if place in self._drawing:
            task, since = self._drawing.pop(place)
            self._cut_off.append(time.monotonic() - since)
            task.cancel()
            self._dropped.add(task)

    def holds_up(self, place: int, patience: float) -> bool:
        """Return whether a prompt of its own is worth drawing elsewhere, too."""
        if not self.is_well:
            return True
        return place in self._drawing and time.monotonic() - self._drawing[place][1] > patience

    async def leave(self) -> None:
        """End whatever is under way."""
        for place in [*self._drawing]:
            self.drop(place)
        under_way: list[asyncio.Future[Any]] = [*self._dropped, *([self.work] if self.work is not None else [])]
        for each in under_way:
            each.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)

    @property
    def mean_seconds(self) -> float | None:
        """The mean time of the prompts that it drew; None: not known."""
        is_known = self._seconds and self.server.retried == self._retried
        return sum(self._seconds) / len(self._seconds) if is_known else None

    def learn(self, fastest: float) -> None:
        """Let the server remember its pace; `fastest` is the mean time of the fastest server's prompts."""
        server = self.server
        if server.retried != self._retried:
            server.pace = 1.0  # how long it was away says nothing of its pace
        elif self.mean_seconds is not None:
            server.pace = self.mean_seconds / fastest
        elif self._cut_off:  # it is as slow as that, or slower
            server.pace = max(max(self._cut_off) / fastest, server.pace)


def choose(seats: Sequence[Seat], waiting: int, at_once: int) -> Seat | None:
    """Return the seat that takes the next of `waiting` prompts, None: all are better left waiting.

    The least loaded one takes it: it would be the first to have it if each prompt more took it as long. A slow server
    takes none that the others, which hold `at_once` prompts each, will have drawn before it could.
    """

    def is_in_time(seat: Seat) -> bool:
        others = [each for each in seats if each is not seat]
        if not others:
            return True
        best, room = min(each.server.pace for each in others), sum(at_once - each.busy for each in others)
        if waiting <= room:  # they could begin all of them now
            return seat.server.pace <= _SLOW * best
        # What they hold now, and then so many rounds. Not rounded up: paces are measured, and a hundredth of a round
        # more would give it prompts that all then wait for.
        rounds = (waiting - room) / sum(at_once / each.server.pace for each in others)
        return seat.server.pace <= best + rounds

    free = [seat for seat in seats if seat.busy < at_once and is_in_time(seat)]
    return min(free, key=lambda seat: (seat.busy + 1) * seat.server.pace, default=None)
