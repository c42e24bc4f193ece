"""The program of the process that functions of the user's own run in: its argument is the number of a pipe.

Plain functions are called in its main thread, one after the other, and async ones in an event loop in a thread of its
own, which is where TRL calls them: a function may then set an alarm, or keep a session open between batches. What it
does (hang, exit, fill the memory, print) happens to this process and not to the run.

The first message that comes in says what to import, each further one is a batch. Nothing of the package is imported.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import importlib.util
import inspect
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_LONGEST = 300  # characters of a message of somebody else's


class Wrong(Exception):
    """What a function gave is of no use; `place` is the number of the sample, None: of all."""

    def __init__(self, what: str, place: int | None = None) -> None:
        super().__init__(what)
        self.place = place


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        first = connection.recv()
        sys.path[:] = first["path"]
        try:
            functions = Functions(first, connection)
        except BaseException as error:  # whatever the user's module does when it is imported
            connection.send(failure(error))
            return
        connection.send({"lines": functions.lines})
        while True:
            functions.judge(connection.recv())
    except EOFError:  # the run has ended
        end()


class Functions:
    """Functions of a module by the names of their rewards, and where each stands (`FILE, line N`).

    With `each` in the first message, they are called for one sample at a time: the time limit is that of one.
    """

    def __init__(self, first: Mapping[str, Any], connection: Connection) -> None:
        module, options = first["module"], first["options"]
        loaded, self._connection, self._each = load(module), connection, first["each"]
        self._functions: dict[str, Callable[..., Any]] = {}
        self.lines: dict[str, str] = {}
        for name, attribute in first["names"].items():
            found = getattr(loaded, attribute, None)
            if not callable(found):
                raise Wrong(f"{module} has no function {attribute}")
            found = found() if isinstance(found, type) else found
            self._functions[name] = functools.partial(found, **options[name]) if options.get(name) else found
            self.lines[name] = place_of(found)
        self.asynchronous = {name for name, function in self._functions.items() if is_async(function)}
        self._loop = asyncio.new_event_loop()
        if self.asynchronous:
            threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def judge(self, batch: Mapping[str, Any]) -> None:
        """Send what each function gives for a batch, as soon as it is there."""
        given, state = dict(batch["keywords"]), SimpleNamespace(**batch["state"])
        count = len(given["completions"])
        waits = []
        for name in batch["names"]:
            own = Logged()
            keywords = {**given, "trainer_state": state, "log_extra": own.extra, "log_metric": own.metric}
            if name in self.asynchronous:
                work = self._awaited(name, keywords, count, own)
                waits.append((name, own, asyncio.run_coroutine_threadsafe(work, self._loop)))
            else:
                self._connection.send({"name": name, "began": True})
                self._send(name, own, functools.partial(self._called, name, keywords, count))
        for name, own, future in waits:
            self._send(name, own, future.result)

    def _send(self, name: str, own: Logged, work: Callable[[], list[float | None]]) -> None:
        try:
            answer: dict[str, Any] = {"values": work(), "metrics": own.metrics}
        except BaseException as error:
            answer = failure(error)
        self._connection.send({"name": name, **answer})

    def _called(self, name: str, keywords: Mapping[str, Any], count: int) -> list[float | None]:
        function = self._functions[name]
        _require_fit(function, keywords)
        if self._each and count > 1:
            return [self._alone(name, _sample(keywords, count, place)) for place in range(count)]
        try:
            return numbers(function(**keywords), count)
        except Wrong:
            raise
        except BaseException as error:
            if count == 1:
                raise Blamed(0) from error
            self._connection.send({"name": name, "failing": failure(error)})  # looking for the sample may take too long
            raise Blamed(_culprit(function, keywords, count)) from error

    def _alone(self, name: str, keywords: Mapping[str, Any]) -> float | None:
        self._connection.send({"name": name, "began": True})
        return self._called(name, keywords, 1)[0]

    async def _awaited(self, name: str, keywords: Mapping[str, Any], count: int, own: Logged) -> list[float | None]:
        _require_fit(self._functions[name], keywords)
        try:
            return numbers(await self._functions[name](**keywords), count)
        except (Wrong, asyncio.CancelledError):
            raise
        except BaseException as error:  # an exit would end the thread of the loop
            raise Blamed(None) from error


class Blamed(Exception):
    """A function raised what is this one's cause; `place` is the number of the sample that it raises it for."""

    def __init__(self, place: int | None) -> None:
        super().__init__()
        self.place = place


class Logged:
    """What a function logs with a batch. Extra columns are for TRL's table of completions, which is not here."""

    def __init__(self) -> None:
        self.metrics: list[tuple[str, float]] = []

    def extra(self, column: str, values: Sequence[Any]) -> None: ...

    def metric(self, name: str, value: float) -> None:
        self.metrics.append((str(name), float(value)))


def _require_fit(function: Callable[..., Any], keywords: Mapping[str, Any]) -> None:
    """Raise Wrong where a function does not take all keywords, which TRL would give it as well."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # compiled code has none
        return
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    lacks = [p.name for p in parameters if p.name in named - {*keywords} and p.default is p.empty]
    if lacks:
        raise Wrong(f"asks for {', '.join(lacks)}, which the rows do not have; there are {', '.join(keywords)}")
    if not any(p.kind is p.VAR_KEYWORD for p in parameters) and (left := [key for key in keywords if key not in named]):
        raise Wrong(f"does not take {', '.join(left)}; allowed: a function that ends with **kwargs")


def _culprit(function: Callable[..., Any], keywords: Mapping[str, Any], count: int) -> int | None:
    """Return the number of the first sample that the function raises something for when it is alone."""
    until = time.monotonic() + 5.0
    for place in range(count):
        if time.monotonic() > until:
            return None
        try:
            function(**_sample(keywords, count, place))
        except BaseException:
            return place
    return None


def _sample(keywords: Mapping[str, Any], count: int, place: int) -> dict[str, Any]:
    """Return the keywords of one sample out of `count`."""
    lists = {key for key, value in keywords.items() if isinstance(value, list) and len(value) == count}
    return {key: [value[place]] if key in lists else value for key, value in keywords.items()}


def numbers(given: Any, count: int) -> list[float | None]:
    """Return what a function gave as one number or None for each of `count` samples.

    Raises:
        Wrong: it is something else.
    """
    if inspect.iscoroutine(given):
        given.close()
        raise Wrong("gave a coroutine, which nobody awaits; allowed: an async function, or a list of numbers")
    if isinstance(given, (str, bytes, Mapping)) or not hasattr(given, "__iter__"):
        raise Wrong(f"gave {shown(given)}; allowed: a list of {count} numbers, None for what it does not apply to")
    items = list(given)
    if len(items) != count:
        raise Wrong(f"gave {len(items)} values for {count} completions; allowed: one for each")
    return [_number(item, place) for place, item in enumerate(items)]


def _number(item: Any, place: int) -> float | None:
    if item is None:
        return None
    try:
        value = math.nan if isinstance(item, (str, bytes)) else float(item)
    except Exception:
        value = math.nan
    if not math.isfinite(value):
        raise Wrong(f"gave {shown(item)}; allowed: a finite number, or None where it does not apply", place)
    return value


def failure(error: BaseException) -> dict[str, Any]:
    """Return what went wrong as the parent tells it: what, for which sample, and in which line of the user's code."""
    if isinstance(error, Wrong):
        return {"wrong": str(error), "place": error.place, "line": None}
    place = error.place if isinstance(error, Blamed) else None
    cause = error.__cause__ if isinstance(error, Blamed) and error.__cause__ is not None else error
    name, text = type(cause).__name__, ""
    with suppress(BaseException):  # an exception of the user's own may fail to be written
        text = " ".join(str(cause).split())[:_LONGEST]
    return {"wrong": f"raised {name}: {text}" if text else f"raised {name}", "place": place, "line": _line_of(cause)}


def _line_of(error: BaseException) -> str | None:
    """Return the innermost line outside this file and the standard library's, else the innermost."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    own = [frame for frame in frames if "importlib" not in frame.filename and "site-packages" not in frame.filename]
    library = os.path.dirname(os.__file__)
    own = [frame for frame in own if not frame.filename.startswith((library, "<"))] or own or frames
    return f"{own[-1].filename}, line {own[-1].lineno}" if own else None


def load(module: str) -> Any:
    """Return a module by its name, or from a file where it is the path of one (`.py`)."""
    if not module.endswith(".py"):
        return importlib.import_module(module)
    path = Path(module).expanduser().resolve()
    if not path.is_file():
        raise Wrong(f"{module}: no such file")
    sys.path.insert(0, str(path.parent))  # what stands beside it may be imported by it
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def is_async(function: Any) -> bool:
    """Return whether a call gives a coroutine: of a function, a partial, or an object with an async `__call__`."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def place_of(function: Any) -> str:
    """Return the file and the line where a function begins."""
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(inspect.unwrap(function), "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return f"{code.co_filename}, line {code.co_firstlineno}" if code else "compiled code"


def shown(value: Any) -> str:
    """Return a value in a few words."""
    try:
        text = " ".join(repr(value).split())
    except Exception:
        text = "..."
    return text if len(text) <= 60 else f"{text[:60]}... ({type(value).__name__})"


def _end_with(parent: int) -> None:
    """End this process when its parent has ended, whatever it is doing."""
    while os.getppid() == parent:
        time.sleep(1.0)
    end()


def end() -> None:
    """End this process, and those that functions have started: it leads a group of its own."""
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
