"""A program that stands in for an inference server's process."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from grpo_mlflow.generation.server.launch import Launch

STUB = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)  # MARK"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *_): pass
print("stub is up", flush=True)
http.server.HTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
"""


def stub(mark: str, source: str = STUB) -> Callable[[str | Path, int], Launch]:
    """A program that answers /health and has a child of its own; `mark` is in both command lines."""

    def start(model: str | Path, port: int) -> Launch:
        text = textwrap.dedent(source).replace("PORT", str(port)).replace("MARK", mark)
        return Launch((sys.executable, "-c", text, mark), {}, "it is there")

    return start
