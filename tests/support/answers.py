"""What a fake server answers instead of what is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.support.fake_server import DIALECTS, Answer, FakeServer

Edit = Callable[[FakeServer, dict[str, Any]], None]


def status(code: int, content: Any = b"") -> Callable[[FakeServer, Answer], Answer]:
    return lambda server, answer: (code, content)


def raising(error: type[Exception]) -> Callable[[FakeServer, Answer], Answer]:
    def answer(server: FakeServer, right: Answer) -> Answer:
        raise error

    return answer


def edited(edit: Edit) -> Callable[[FakeServer, Answer], Answer]:
    """Change the first completion of an answer."""

    def answer(server: FakeServer, right: Answer) -> Answer:
        edit(server, DIALECTS[server.dialect].completions(right[1])[0])
        return right

    return answer


def ids(change: Callable[[list[int]], Any]) -> Callable[[FakeServer, Answer], Answer]:
    def edit(server: FakeServer, completion: dict[str, Any]) -> None:
        key = DIALECTS[server.dialect].ids
        completion[key] = change(completion[key])

    return edited(edit)


def logprobs(change: Callable[[list[float]], Any]) -> Callable[[FakeServer, Answer], Answer]:
    def edit(server: FakeServer, completion: dict[str, Any]) -> None:
        dialect = DIALECTS[server.dialect]
        dialect.set_logprobs(completion, change(dialect.logprobs(completion)))

    return edited(edit)


def finish(reason: str) -> Callable[[FakeServer, Answer], Answer]:
    def edit(server: FakeServer, completion: dict[str, Any]) -> None:
        DIALECTS[server.dialect].set_finish(completion, reason)
        if reason == "stop":  # and no end token
            key = DIALECTS[server.dialect].ids
            completion[key] = [8 if token == 1 else token for token in completion[key]]

    return edited(edit)


def counted(change: Callable[[list[Any]], list[Any]]) -> Callable[[FakeServer, Answer], Answer]:
    def answer(server: FakeServer, right: Answer) -> Answer:
        dialect = DIALECTS[server.dialect]
        return 200, dialect.answer_with(change(dialect.completions(right[1])))

    return answer
