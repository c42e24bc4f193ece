"""Signs of life between the processes of a run, beside its collectives.

A collective whose peer was killed fails at once on some transports and waits for hours on others, and one that waits
for a busy peer looks the same as one that waits for a dead one. So every process keeps a connection to the first: the
system closes it when the process dies, and where nothing at all comes (a machine without power, a process that stands
still) silence tells. It also carries what cannot wait for the next collective: that somebody asked to stop, and that a
process is lost.

torch's own means do not do this. The timeout of a collective cannot tell slow from dead: it has to be longer than the
longest sampling, and only then is a lost process noticed. A launcher (`torchrun`) notices that a process of its own has
ended, not that one stands still, and all that it can do is to end the others.
"""

from __future__ import annotations

import contextlib
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping

INTERVAL = 0.5  # seconds between two signs of life
SILENCE = 20.0  # seconds without one, after which a process counts as gone
_CONNECTING = 60.0


class Meeting:
    """Where the first process waits for the connections of the others."""

    def __init__(self) -> None:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self._server = socket.create_server(("", 0), family=family, dualstack_ipv6=both)
        self._server.settimeout(_CONNECTING)
        self.port: int = self._server.getsockname()[1]
        self.secret = secrets.token_hex(16)

    def accept(self, others: int) -> dict[int, socket.socket]:
        """Return the connections by process number once all others are there."""
        found: dict[int, socket.socket] = {}
        with self._server:
            while len(found) < others:
                connection, _ = self._server.accept()
                connection.settimeout(_CONNECTING)
                secret, _, rank = connection.makefile().readline().strip().partition(" ")
                if secrets.compare_digest(secret, self.secret):
                    found[int(rank)] = connection
                else:  # a stranger, such as a port scanner
                    connection.close()
        return found


def connect(host: str, port: int, secret: str, rank: int) -> dict[int, socket.socket]:
    """Return the connection of process `rank` to the first, as {0: connection}."""
    connection = socket.create_connection((host, port), timeout=_CONNECTING)
    connection.sendall(f"{secret} {rank}\n".encode())
    return {0: connection}


class Heartbeat:
    """The signs of life of process `rank`, from a thread of its own.

    Args:
        connections: to all others in the first process, to the first in the others; closed in the end.
        on_stop: called once, in that thread, with the number of the signal that another process got.
        on_loss: called once, in that thread, with a line about the process that is lost.
        silence: seconds.
    """

    def __init__(
        self,
        connections: Mapping[int, socket.socket],
        rank: int,
        on_stop: Callable[[int], None],
        on_loss: Callable[[str], None],
        silence: float = SILENCE,
    ) -> None:
        self._connections, self._rank, self._silence = connections, rank, silence
        self._on_stop, self._on_loss = on_stop, on_loss
        self._heard = dict.fromkeys(connections, time.monotonic())
        self._ended: set[int] = set()
        self._stop: int | None = None
        self._stop_passed_on = False
        self._farewell: str | None = None
        self._known, self._over = threading.Event(), threading.Event()
        self.loss: str | None = None
        self.first_lost = False
        threading.Thread(target=self._run, daemon=True, name="heartbeat").start()

    def stop(self, signum: int) -> None:
        """Let all processes know of a signal that this one got."""
        self._stop = signum

    def wait_for_loss(self, seconds: float) -> str | None:
        """Wait at most so long until a process is known to be lost, and return the line about it."""
        self._known.wait(seconds)
        return self.loss

    def end(self, failure: str | None) -> None:
        """Say that the run is over here.

        Without `failure`, wait for the others: a launcher ends all that are left soon after one has ended. With it, do
        not wait, and let them know why.
        """
        self._farewell = "ended" if failure is None else f"failed {failure}"
        self._over.wait(None if failure is None else 4 * INTERVAL)

    def _run(self) -> None:
        said_farewell = False
        with contextlib.ExitStack() as closing, selectors.DefaultSelector() as selector:
            waiting: dict[int, bytes] = {}
            for other, connection in self._connections.items():
                closing.enter_context(connection)
                connection.settimeout(self._silence)
                selector.register(connection, selectors.EVENT_READ, other)
                waiting[other] = b""
            until = 0.0
            while self.loss is None and not (said_farewell and self._may_leave()):
                if time.monotonic() >= until:
                    until = time.monotonic() + INTERVAL
                    farewell = self._farewell
                    self._say(farewell or "alive")
                    said_farewell = farewell is not None
                    if self._stop is not None and not self._stop_passed_on:
                        self._stop_passed_on = True
                        self._say(f"stop {self._stop}")
                for key, _ in selector.select(max(0.0, until - time.monotonic())):
                    other, received = key.data, b""
                    with contextlib.suppress(OSError):
                        received = key.fileobj.recv(4096)  # type: ignore[union-attr]
                    if not received:
                        selector.unregister(key.fileobj)
                        self._closed(other)
                    *lines, waiting[other] = (waiting[other] + received).split(b"\n")
                    for line in lines:
                        self._hear(other, line.decode())
                for other, heard in self._heard.items():
                    if other not in self._ended and time.monotonic() - heard > self._silence:
                        self._lose(f"process {other} gave no sign of life for {self._silence:.0f} s", other)
        self._over.set()
        if self.loss is not None:
            self._on_loss(self.loss)

    def _may_leave(self) -> bool:
        return self._farewell != "ended" or self._ended.issuperset(self._connections)

    def _say(self, line: str) -> None:
        for connection in self._connections.values():
            with contextlib.suppress(OSError):  # reading finds out
                connection.sendall(f"{line}\n".encode())

    def _hear(self, other: int, line: str) -> None:
        self._heard[other] = time.monotonic()
        kind, _, rest = line.partition(" ")
        if kind == "ended":
            self._ended.add(other)
        elif kind == "failed":
            self._lose(f"process {other} failed: {rest}", other)
        elif kind == "lost":
            self._lose(rest)
        elif kind == "stop" and self._stop is None:
            self._stop = int(rest)
            self._on_stop(self._stop)

    def _closed(self, other: int) -> None:
        if other not in self._ended:
            self._lose(f"process {other} is gone", other)

    def _lose(self, line: str, other: int | None = None) -> None:
        if self.loss is None:
            self.loss, self.first_lost = line, other == 0
            self._known.set()
            if self._rank == 0:
                self._say(f"lost {line}")
