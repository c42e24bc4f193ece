"""What a person sees of a run: a progress bar on a terminal, one line per iteration everywhere, a closing summary."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm


class Console:
    """Prints for one process; `quiet` for all but the first."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._bar: tqdm[Any] | None = None

    def say(self, text: str) -> None:
        if not self._quiet:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def warn(self, text: str) -> None:
        if not self._quiet:
            tqdm.write(f"warning: {text}", file=sys.stderr)

    def start(self, title: str, total: int, done: int = 0) -> None:
        """Open a progress bar; nothing is drawn where the output is no terminal."""
        self.stop()
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
            self._bar.set_postfix(values, refresh=False)
            self._bar.update(done - self._bar.n)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
