"""What a person sees of a run: a progress bar on a terminal, one line per iteration everywhere, a closing summary.

Nobody may be there to see it: a terminal closes, `tee` ends before what it reads. The run goes on without a word.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from grpo_mlflow.errors import redact
from grpo_mlflow.runtime.folding import fitted


class Console:
    """Prints for one process; `quiet` for all but the first."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._bar: tqdm[Any] | None = None

    def say(self, text: str) -> None:
        if not self._quiet:
            with _perhaps_unread():
                tqdm.write(fitted(redact(text), sys.stdout), file=sys.stdout)
                sys.stdout.flush()

    def warn(self, text: str) -> None:
        if not self._quiet:
            with _perhaps_unread():
                tqdm.write(fitted(f"warning: {redact(text)}", sys.stderr), file=sys.stderr)

    def start(self, title: str, total: int, done: int = 0) -> None:
        """Open a progress bar; nothing is drawn where the output is no terminal."""
        self.stop()
        with _perhaps_unread():
            self._bar = tqdm(
                total=total,
                initial=done,
                desc=title,
                leave=False,
                dynamic_ncols=True,
                disable=self._quiet or not sys.stderr.isatty(),
            )

    def advance(self, done: int, values: Mapping[str, str]) -> None:
        if self._bar is not None:
            with _perhaps_unread():
                self._bar.set_postfix(values, refresh=False)
                self._bar.update(done - self._bar.n)

    def stop(self) -> None:
        if self._bar is not None:
            with _perhaps_unread():
                self._bar.close()
            self._bar = None


@contextmanager
def _perhaps_unread() -> Iterator[None]:
    """Turn what can no longer be written into silence, for whatever else writes there too."""
    try:
        yield
    except OSError:
        outputs = select.poll()
        for number in (1, 2):
            outputs.register(number, 0)  # errors and hang-ups are told without being asked for
        with open(os.devnull, "wb") as nowhere:
            for number, _ in outputs.poll(0):
                os.dup2(nowhere.fileno(), number)
