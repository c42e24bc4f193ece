"""A go-between of trainer and server over HTTP: it passes everything on, but for what a fault makes of it."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

Answer = tuple[int, bytes]  # status, content
Forward = Callable[[str, Any], Answer]  # of a path and the JSON of a body
Fault = Callable[[str, Any, Forward], Answer]


class GoBetween:
    """Stands before the server at `url`. A fault answers each POST; it may pass on another one, several, or none."""

    def __init__(self, url: str) -> None:
        self._server = urlsplit(url).netloc
        self._fault: Fault | None = None
        self.paths: list[str] = []  # of the POSTs, in their order
        between = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer(*between._ask("GET", self.path, None))

            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                between.paths.append(urlsplit(self.path).path)
                body = json.loads(content) if content else None
                fault = between._fault
                self._answer(*(fault(self.path, body, between._post) if fault else between._post(self.path, body)))

            def _answer(self, status: int, content: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                if self.close_connection:  # as it was asked for; unsaid, the next request would still be sent on it
                    self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None: ...

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> GoBetween:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @contextmanager
    def planted(self, fault: Fault) -> Iterator[None]:
        """Inside the block, answer by this fault."""
        self._fault = fault
        try:
            yield
        finally:
            self._fault = None

    def _post(self, path: str, body: Any) -> Answer:
        return self._ask("POST", path, None if body is None else json.dumps(body).encode())

    def _ask(self, method: str, path: str, content: bytes | None) -> Answer:
        connection = http.client.HTTPConnection(self._server, timeout=300)
        try:
            connection.request(method, path, content, {"Content-Type": "application/json", "Connection": "close"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()
