"""Scripted servers of MLflow artifacts, on loopback."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import parse_qs, urlparse


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


class Memory(Artifacts):
    """A server of artifacts in memory, which does not take files with `away` in their names ("": any file)."""

    files: ClassVar[dict[str, bytes]] = {}
    away: ClassVar[str | None] = None

    @property
    def _name(self) -> str:
        return urlparse(self.path).path.removeprefix("/mlflow-artifacts/artifacts/")

    def _answer(self, code: int, content: bytes = b"") -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.away is not None and self.away in self._name:
            return self._answer(501)  # which MLflow does not try again
        self.files[self._name] = content
        return self._answer(200)

    def do_DELETE(self) -> None:
        for name in [name for name in self.files if name == self._name or name.startswith(f"{self._name}/")]:
            del self.files[name]
        self._answer(200)

    def do_GET(self) -> None:
        asked = parse_qs(urlparse(self.path).query).get("path")
        if asked is None:
            content = self.files.get(self._name)
            return self._answer(404) if content is None else self._answer(200, content)
        inside = [name[len(asked[0]) + 1 :] for name in self.files if name.startswith(f"{asked[0]}/")]
        found = {name.partition("/")[0]: "/" in name for name in inside}
        files = [{"path": name, "is_dir": is_dir} for name, is_dir in sorted(found.items())]
        return self._answer(200, json.dumps({"files": files}).encode())
