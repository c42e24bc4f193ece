"""What a generator asks of the servers that draw for it, wherever they are."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

from grpo_mlflow.generation.server.batches import Told
from grpo_mlflow.generation.server.engine import Ask, Draw


class Servers(Protocol):
    """What draws for a generator. `version` is the one that it serves, None before the first sync."""

    version: int | None

    @property
    def url(self) -> str:
        """Where it is, for messages."""
        ...

    def sync(self, version: int) -> None: ...

    def start(self, asks: Sequence[Ask], at_once: int, told: Told | None = None) -> Future[list[list[Draw]]]:
        """Begin to sample, `at_once` prompts in flight at each server; the future holds the draws in order of `asks`.

        `told` is as in `batches.sample`, and called in another thread.
        """
        ...

    def rest(self) -> None:
        """Let servers of ours give up their GPUs' memory until they are next asked."""
        ...

    def metrics(self) -> dict[str, float]: ...

    def close(self) -> None: ...
