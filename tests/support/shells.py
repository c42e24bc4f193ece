"""A real shell on a terminal of its own: what it shows when keys are typed."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import time
from pathlib import Path
from types import TracebackType

_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r|\x07")
_LONGEST = 20.0


class Shell:
    """An interactive shell; it ends with the block."""

    def __init__(self, words: list[str], folder: Path, variables: dict[str, str]) -> None:
        self._master, slave = pty.openpty()
        own = {**os.environ, "TERM": "dumb", "PS1": "READY> ", "COLUMNS": "200", "LINES": "200", **variables}
        self._process = subprocess.Popen(
            words, stdin=slave, stdout=slave, stderr=slave, cwd=folder, env=own, start_new_session=True
        )
        os.close(slave)

    def __enter__(self) -> Shell:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)

    def type(self, keys: str, until: str) -> str:
        """Type keys and return what is shown from then on, up to a text that matches `until`.

        Raises:
            AssertionError: no such text is shown.
        """
        os.write(self._master, keys.encode())
        shown, end = "", time.monotonic() + _LONGEST
        while time.monotonic() < end:
            if select.select([self._master], [], [], 0.1)[0]:
                shown += _CODES.sub("", os.read(self._master, 65536).decode(errors="replace"))
            if re.search(until, shown):
                return shown
        raise AssertionError(f"{keys!r} showed {shown!r}, not {until!r}")
