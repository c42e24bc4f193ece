"""vLLM's sleep mode: a server gives up its GPU's memory while it has nothing to do. No GPU has run this yet.

A server that was started with `--enable-sleep-mode` moves its weights to host memory and drops its KV cache (level 1),
and takes both back when it wakes. Trainer and server can then share one GPU, each with most of its memory in turn.
"""

from __future__ import annotations

import asyncio

from grpo_mlflow.runtime.http.client import Client


class Sleep:
    """Puts one server to sleep, and wakes it before it is asked."""

    def __init__(self, client: Client) -> None:
        self._client, self._asleep, self._waking = client, False, asyncio.Lock()

    async def begin(self) -> None:
        """Put the server to sleep once it has answered what it was asked."""
        self._asleep = True  # it may be even if its answer is lost
        await self._client.post("/sleep", query={"level": 1, "mode": "wait"})

    async def end(self) -> None:
        """Wake the server if it was put to sleep. One that was started again since then is awake, and stays it."""
        async with self._waking:
            if self._asleep:
                await self._client.post("/wake_up")
                self._asleep = False
