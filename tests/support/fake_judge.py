"""An OpenAI-compatible chat server over real HTTP that grades as a test says, and counts what it is asked."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def material(body: dict[str, Any]) -> list[str]:
    """Return the JSON strings that a rubric of one line each quotes: after `NAME: `, up to the end of the line."""
    lines = body["messages"][1]["content"].splitlines()
    return [json.loads(line.partition(": ")[2]) for line in lines if line.partition(": ")[2].startswith('"')]


def by_length(body: dict[str, Any]) -> str:
    """Grade 5 for a completion of an even length, else 1; the completion is what the rubric quotes last."""
    return json.dumps({"reason": "its length", "score": 1 if len(material(body)[-1]) % 2 else 5})


@dataclass
class FakeJudge:
    """Serves at `url` inside a `with` block.

    `answer` makes of a request's body what the model says; `seconds` is what each takes. `refuse` gives, by the number
    of a request from 1 on, a status and a body to answer with instead, or None.
    """

    answer: Callable[[dict[str, Any]], str] = by_length
    seconds: float = 0.0
    refuse: Callable[[int, dict[str, Any]], tuple[int, str] | None] = lambda number, body: None
    port: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    most_at_once: int = 0
    _at_once: int = 0
    _connections: list[socket.socket] = field(default_factory=list)

    def __enter__(self) -> FakeJudge:
        fake, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                fake._connections.append(self.connection)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    fake.bodies.append(body)
                    fake.keys.add(self.headers["Authorization"])
                    number = len(fake.bodies)
                    fake._at_once += 1
                    fake.most_at_once = max(fake.most_at_once, fake._at_once)
                time.sleep(fake.seconds)
                refused = fake.refuse(number, body) if self.path == "/v1/chat/completions" else (404, "no such path")
                with lock:
                    fake._at_once -= 1
                status, content = refused or (200, json.dumps(fake._completion(body)))
                self.send_response(status)
                self.send_header("Content-Length", str(len(content.encode())))
                self.end_headers()
                self.wfile.write(content.encode())

            def log_message(self, *_: Any) -> None: ...

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def handle_error(self, *_: Any) -> None: ...  # a client that went away

        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        for connection in self._connections:  # those that are kept open would be served on
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def asked(self) -> int:
        return len(self.bodies)

    def _completion(self, body: dict[str, Any]) -> dict[str, Any]:
        message = {"role": "assistant", "content": self.answer(body)}
        return {
            "object": "chat.completion",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        }
