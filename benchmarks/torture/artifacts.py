"""A server of MLflow's artifacts on loopback, in a process of its own, which is away when a case says so.

The folder of a case is the first part of a name: `c000012-5-3` has its 5th file and the two after it refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import parse_qs, urlparse

ROOT = "/mlflow-artifacts/artifacts"


class Memory(BaseHTTPRequestHandler):
    """Keeps files in memory, and takes none while it is away."""

    files: ClassVar[dict[str, bytes]] = {}

    def log_message(self, *given: object) -> None:
        pass

    @property
    def _name(self) -> str:
        return urlparse(self.path).path.removeprefix(f"{ROOT}/")

    def _answer(self, code: int, content: bytes = b"") -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _is_away(self) -> bool:
        return False

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self._is_away():
            return self._answer(501)  # which MLflow's client does not try again
        self.files[self._name] = content
        return self._answer(200)

    def do_DELETE(self) -> None:
        for name in [name for name in list(self.files) if name == self._name or name.startswith(f"{self._name}/")]:
            del self.files[name]
        self._answer(200)

    def do_GET(self) -> None:
        given = parse_qs(urlparse(self.path).query)
        if "all" in given:
            return self._answer(200, json.dumps(self._all(given["all"][0])).encode())
        if "path" not in given:
            content = self.files.get(self._name)
            return self._answer(404) if content is None else self._answer(200, content)
        prefix = f"{given['path'][0]}/"
        inside = [name.removeprefix(prefix) for name in list(self.files) if name.startswith(prefix)]
        found = {name.partition("/")[0]: "/" in name for name in inside}
        files = [{"path": name, "is_dir": is_dir} for name, is_dir in sorted(found.items())]
        return self._answer(200, json.dumps({"files": files}).encode())

    def _all(self, folder: str) -> dict[str, list[str]]:
        """Return of each file below a folder its hash, and its text if it is a manifest."""
        found = {}
        for name, content in list(self.files.items()):
            if name.startswith(f"{folder}/"):
                text = content.decode() if name.endswith("manifest.json") else ""
                found[name.removeprefix(f"{folder}/")] = [hashlib.sha256(content).hexdigest(), text]
        return found


class Store(Memory):
    """Is away when a case says so."""

    asked: ClassVar[Counter[str]] = Counter()

    def _is_away(self) -> bool:
        case = self._name.partition("/")[0]
        _, first, count = case.split("-")
        self.asked[case] += 1
        return int(first) <= self.asked[case] < int(first) + int(count)


def start() -> tuple[int, str]:
    """Start the server; return its process and its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Store)
    address = f"http://127.0.0.1:{server.server_port}{ROOT}"
    if pid := os.fork():
        server.server_close()
        return pid, address
    try:
        server.serve_forever()
    finally:
        os._exit(0)
