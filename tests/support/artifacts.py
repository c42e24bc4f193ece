"""Scripted servers of MLflow artifacts, on loopback."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Artifacts(BaseHTTPRequestHandler):
    def log_message(self, *given: object) -> None:
        pass


@contextmanager
def serving(handler: type[Artifacts]) -> Iterator[str]:
    """Serve artifacts on loopback; give the address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/mlflow-artifacts/artifacts"
        server.shutdown()
