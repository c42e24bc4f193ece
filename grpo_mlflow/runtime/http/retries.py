"""How often, how long, and how patiently a failing server is asked again.

Written here and not taken from `tenacity` or `backoff`, because most of it is what these leave to callbacks: the time
counts from the first failure and not from the call (an answer may take minutes), the server may name the pause, a
repair that can fail itself comes before each further try, and a batch whose requests all fail at once warns once.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from grpo_mlflow.errors import ServerAway, redact
from grpo_mlflow.program import program
from grpo_mlflow.runtime.http.client import Fault

T = TypeVar("T")
_FIRST, _LONGEST = 0.1, 10.0  # seconds
_WARNING = 30.0  # seconds between two warnings
_DOCTOR = f"; `{program()} doctor` with the same settings says what is wrong"
_JITTER = random.Random()  # its own: the global generator may be somebody's
log = logging.getLogger(__name__)


class Retries:
    """Asks again with exponential backoff and jitter until `seconds` have passed since the first failure of a request.

    `server` is its address, for the warning. `setting` is what `seconds` is set by, `hint` what the warning ends with.
    `count` is how often it asked again; `failing`: a request has failed, and none was answered since. Jitter keeps the
    concurrent requests of a batch from coming back all at once.
    """

    def __init__(
        self, server: str, seconds: float, setting: str = "generation.retry_seconds", hint: str = _DOCTOR
    ) -> None:
        self._server, self._seconds, self._setting, self._hint = server, seconds, setting, hint
        self._warn_at = 0.0
        self.count = 0
        self.failing = False

    async def ask(self, what: str, request: Callable[[], Awaitable[T]], mend: Callable[[], Awaitable[None]]) -> T:
        """Return what `request` returns, after `mend` before each further try.

        Raises:
            ServerAway: the budget is spent; the line names the last failure.
        """
        failed_at: float | None = None
        pause = _FIRST
        while True:
            try:
                if failed_at is not None:
                    await mend()
                found = await request()
                self.failing = False
                return found
            except Fault as fault:
                self.failing = True
                now = time.monotonic()
                failed_at = now if failed_at is None else failed_at
                wait = max(fault.wait, pause * _JITTER.uniform(0.5, 1.5))
                left = failed_at + self._seconds - now
                if left <= 0:
                    spent = f" for {self._seconds:g} s ({self._setting})" if self._seconds else ""
                    raise ServerAway(f"{what} failed{spent}: {fault}") from fault
                if pause == _FIRST and now >= self._warn_at:  # all requests of a batch fail at once
                    self._warn_at = now + _WARNING
                    log.warning(
                        "the server at %s: %s: %s; asking again for %g s (%s)%s",
                        *(redact(self._server), what, fault, self._seconds, self._setting, self._hint),
                    )
                self.count += 1
                await asyncio.sleep(min(wait, left))
                pause = min(2 * pause, _LONGEST)
