"""Runs a command and ends it, with its whole process group, when standard input closes.

    python warden.py COMMAND ...

The trainer holds the other end of that pipe. However the trainer ends, kill -9 included, the operating system closes
it, so a server never outlives its run. What a server that died by itself left behind is ended, too.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

GRACE = 5.0  # seconds between asking and killing


def end(child: subprocess.Popen[bytes]) -> None:
    """Ask the group to end, then kill what is left of it."""
    for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, None)):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            return
        try:
            child.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def main() -> int:
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)

    def watch() -> None:
        os.read(0, 1)  # not through sys.stdin, whose lock would abort the interpreter's end
        end(child)

    threading.Thread(target=watch, daemon=True).start()
    code = child.wait()
    end(child)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
