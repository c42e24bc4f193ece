"""Mistakes of several checks, collected so that all of them are told at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from grpo_mlflow.errors import ConfigError


class Mistakes:
    """The lines of what was found so far, each once."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note what a ConfigError says that the block raises; what comes after the block is checked all the same."""
        try:
            yield
        except ConfigError as error:
            self.lines += [line for line in str(error).splitlines() if line not in self.lines]

    def require_none(self) -> None:
        """Raise ConfigError if there was a mistake."""
        if self.lines:
            raise ConfigError("\n".join(self.lines))
