"""Scripted servers of MLflow artifacts, on loopback."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

from benchmarks.torture import artifacts


class Artifacts(BaseHTTPRequestHandler):
    def log_message(self, *given: object) -> None:
        pass


@contextmanager
def serving(handler: type[Artifacts]) -> Iterator[str]:
    """Serve artifacts on loopback; give the address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}{artifacts.ROOT}"
        server.shutdown()


class Memory(artifacts.Memory, Artifacts):
    """A server of artifacts in memory, which does not take files with `away` in their names ("": any file)."""

    files: ClassVar[dict[str, bytes]] = {}
    away: ClassVar[str | None] = None

    def _is_away(self) -> bool:
        return self.away is not None and self.away in self._name
