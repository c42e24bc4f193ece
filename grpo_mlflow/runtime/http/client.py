"""HTTP to an inference server: JSON out and in, failures sorted into those that may pass and those that will not.

All requests go through the `openai` SDK's client (its connections, key and timeouts), with its own retries off: what a
retry may repeat, and how long, is decided in one place, `retries`. The SDK is imported where it is used: that takes a
second, and a run without a server has no use for it.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from grpo_mlflow.errors import one_line, redact
from grpo_mlflow.runtime.http.connection import open_client, proxy_of

T = TypeVar("T")
_MAY_PASS = (408, 409, 425, 429)
_NEVER = 501  # not implemented


class Fault(Exception):
    """A failure that may pass: asking again is right.

    `wait` is what the server asked for, in seconds. `answered`: the server is alive, its answer is what is wrong.
    """

    def __init__(self, message: str, wait: float = 0.0, *, answered: bool = True) -> None:
        super().__init__(message)
        self.wait, self.answered = wait, answered


class Refusal(Exception):
    """The server will not do this, however often it is asked. `status` is its HTTP status, 0 for our verdict."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class Unfit(Refusal):
    """The server was started without something that is needed. `instead` are settings that do without it."""

    def __init__(self, message: str, instead: str = "") -> None:
        super().__init__(message)
        self.instead = instead


class Client:
    """Talks to the server at `base_url` (with or without a trailing /v1); use it inside one event loop.

    `timeout` is how long a request may take, from its connection to the last byte of its answer, in seconds. `key` is
    what it is sent as its key; None: OPENAI_API_KEY of the environment.

    Raises:
        UserError: the key or the proxy in the environment cannot be used.
    """

    def __init__(self, base_url: str, timeout: float, key: str | None = None) -> None:
        self.root = base_url.rstrip("/").removesuffix("/v1")
        self._timeout, proxy = timeout, proxy_of(self.root)
        self._through = f" (through the proxy {proxy})" if proxy else ""
        self._sdk = open_client(self.root, timeout, key)

    async def get(self, path: str) -> Any:
        """Return the JSON answer.

        Raises:
            Fault: no or no whole answer, or a status that may pass.
            Refusal: any other status than success.
        """
        return await self._decoded(path, self._sdk.get(f"{self.root}{path}", cast_to=bytes))

    async def post(
        self, path: str, body: Any = None, query: dict[str, object] | None = None, last: bool = False
    ) -> Any:
        """As `get`; None where a successful answer has no body, its text where it is not meant as JSON.

        `last`: the connection is not used again. A server that answers 500 closes it, and what is sent meanwhile fails.
        """
        options: Any = {"params": query} if query else {}
        if last:
            options["headers"] = {"Connection": "close"}
        return await self._decoded(
            path, self._sdk.post(f"{self.root}{path}", cast_to=bytes, body=body, options=options)
        )

    async def close(self) -> None:
        await self._sdk.close()

    async def _decoded(self, path: str, answer: Coroutine[Any, Any, bytes]) -> Any:
        content = await self._content(f"{path}{self._through}", answer)
        if not content:
            return None
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            text = content.decode(errors="replace")
            if text.lstrip().startswith(("{", "[")):
                what = "JSON nested too deeply" if isinstance(error, RecursionError) else "a body that ends too early"
                raise Fault(f"{path}{self._through} answers with {what}", answered=False) from None
            return text

    async def _content(self, path: str, answer: Coroutine[Any, Any, bytes]) -> bytes:
        """Return the bytes of an answer: this is where the libraries' exceptions are sorted, and they end here."""
        import openai

        try:
            # The SDK's timeout is for each read: a byte now and then would keep the request open forever.
            return await asyncio.wait_for(answer, self._timeout)
        except openai.APIStatusError as error:
            status, message = (
                error.status_code,
                f"{path} answers {error.status_code}: {_message(error.response.content)}",
            )
            if (status >= 500 and status != _NEVER) or status in _MAY_PASS:
                raise Fault(message, _seconds(error.response.headers.get("retry-after"))) from error
            raise Refusal(message, status) from error
        except asyncio.TimeoutError as error:
            raise Fault(f"{path} does not answer in time", answered=False) from error
        except Exception as error:
            # Not all of them are the SDK's: aiohttp's for a malformed header or chunk pass it as they are, and a
            # status line in another encoding is a UnicodeError.
            raise Fault(f"{path}{_failure(error)}", answered=False) from error


class Loop:
    """An event loop in a thread of its own: the main thread only waits, so that a signal reaches it at once."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="inference-client", daemon=True)
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Return the result; whatever interrupts the wait cancels the work."""
        future = self.start(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self, last: Callable[[], Awaitable[None]] | None = None, seconds: float = 5.0) -> bool:
        """Cancel the work under way, wait for it to end, do `last`, and end the thread.

        Without the wait, a request is garbage-collected after the loop has closed, and fails to close its response.

        Returns:
            Whether all of it ended within `seconds`; the thread ends in any case.
        """
        try:
            return self.run(_finish(last, seconds))
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


async def _finish(last: Callable[[], Awaitable[None]] | None, seconds: float) -> bool:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()

    async def end() -> None:
        if tasks:
            await asyncio.wait(tasks)
        if last is not None:
            await last()
        await asyncio.get_running_loop().shutdown_asyncgens()
        await asyncio.sleep(0)  # a closed transport lets go of its socket in the loop's next round

    try:
        await asyncio.wait_for(end(), seconds)
    except asyncio.TimeoutError:
        return False
    return True


async def all_of(work: Sequence[Awaitable[T]]) -> list[T]:
    """Await all in order; the first failure cancels the rest."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _message(body: bytes) -> str:
    """Return what an error body says, in one line; the servers wrap it differently."""
    content: Any
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        content = body.decode(errors="replace")
    while isinstance(content, dict):
        content = next((content[key] for key in ("error", "message", "detail") if key in content), str(content))
    return " ".join(redact(str(content)).split())[:300] or "no reason given"


def _failure(error: Exception) -> str:
    """Return what kept a request from being answered. The transport calls every end of a connection a timeout."""
    cause = _innermost(error)
    if isinstance(cause, TimeoutError):
        return " does not answer in time"
    return f": cannot connect: {_named(cause)}" if isinstance(cause, OSError) else f": {_named(cause)}"


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}" if str(error) else type(error).__name__


def _seconds(header: str | None) -> float:
    try:
        return max(0.0, float(header or 0))
    except ValueError:  # a date
        return 0.0
