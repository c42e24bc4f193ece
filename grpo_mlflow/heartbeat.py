"""Signs of life between the processes of a run, beside its collectives.

A collective whose peer was killed fails at once on some transports and waits for hours on others, and one that waits
for a busy peer looks the same as one that waits for a dead one. So every process tells a small store, held by the
first, that it lives; the first watches all others, and they watch it. The same store carries what cannot wait for the
next collective: that somebody asked to stop, and that a process is lost.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import TCPStore

INTERVAL = 0.5  # seconds between two signs of life
SILENCE = 20.0  # seconds without one, after which a process counts as gone
_ENDED, _FAILED, _STOP, _LOST = "ended", "failed: ", "stop", "lost"


class Heartbeat:
    """The signs of life of process `rank` of `count`, from a thread of its own.

    Args:
        store: the store that all of them share.
        on_stop: called once, in that thread, with the number of the signal that another process got.
        on_loss: called once, in that thread, with a line about the process that is lost.
        silence: seconds.
    """

    def __init__(
        self,
        store: TCPStore,
        rank: int,
        count: int,
        on_stop: Callable[[int], None],
        on_loss: Callable[[str], None],
        silence: float = SILENCE,
    ) -> None:
        self._store, self._rank, self._silence = store, rank, silence
        self._watched = range(1, count) if rank == 0 else range(1)
        self._on_stop, self._on_loss = on_stop, on_loss
        self._signal: int | None = None
        self._stopped = False
        self._ending: str | None = None
        self._known, self._over = threading.Event(), threading.Event()
        self.loss: str | None = None
        self.first_lost = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="heartbeat")
        self._thread.start()

    def stop(self, signum: int) -> None:
        """Let all processes know of a signal that this one got."""
        self._signal = signum

    def wait_for_loss(self, seconds: float) -> str | None:
        """Wait at most so long until a process is known to be lost, and return the line about it."""
        self._known.wait(seconds)
        return self.loss

    def end(self, failure: str | None) -> None:
        """Say that the run is over here.

        Without `failure`, wait for the processes that this one watches: the first holds the store, and a launcher
        soon ends all that are left after one has ended. With it, do not wait, and let the others know why.
        """
        self._ending = _ENDED if failure is None else _FAILED + failure
        self._over.wait(None if failure is None else 4 * INTERVAL)

    def _run(self) -> None:
        said = dict.fromkeys(self._watched, "")
        heard = dict.fromkeys(self._watched, time.monotonic())
        number = 0
        while self.loss is None:
            number += 1
            ending = self._ending
            try:
                self._store.set(f"alive/{self._rank}", ending or str(number))
                self._pass_on()
                for other in self._watched:
                    key = f"alive/{other}"
                    now = self._store.get(key).decode() if self._store.check([key]) else ""
                    if now != said[other]:
                        said[other], heard[other] = now, time.monotonic()
                    if now.startswith(_FAILED):
                        self._lose(f"process {other} {now}")
                    elif now != _ENDED and time.monotonic() - heard[other] > self._silence:
                        self._lose(f"process {other} gave no sign of life for {self._silence:.0f} s")
            except RuntimeError:  # torch's, where the store does not answer
                self.first_lost = ending is None
                if ending is not None:
                    break
                self._lose("process 0 is gone")
            if ending is not None and (ending != _ENDED or all(word == _ENDED for word in said.values())):
                break
            time.sleep(INTERVAL)
        self._over.set()
        if self.loss is not None:
            self._on_loss(self.loss)

    def _pass_on(self) -> None:
        """Tell of a signal of ours; hear of one that another got, and of a loss that the first process noticed."""
        if self._signal is not None and not self._stopped:
            self._stopped = True
            self._store.set(_STOP, str(self._signal))
        if not self._stopped and self._store.check([_STOP]):
            self._stopped = True
            self._on_stop(int(self._store.get(_STOP)))
        if self._rank > 0 and self._store.check([_LOST]):
            self._lose(self._store.get(_LOST).decode())

    def _lose(self, line: str) -> None:
        if self.loss is None:
            self.loss = line
            self.first_lost = self._rank > 0 and line.startswith("process 0 ")
            self._known.set()
            if self._rank == 0:
                with contextlib.suppress(RuntimeError):
                    self._store.set(_LOST, line)


def shared_store(host: str, port: int, first: bool) -> TCPStore:
    """Open the store of `Heartbeat`: the first process (port 0: any free one) holds it, the others connect to it."""
    return TCPStore(host, port, is_master=first, wait_for_workers=False, timeout=timedelta(seconds=SILENCE))
