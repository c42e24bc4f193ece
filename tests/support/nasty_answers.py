"""Forty answers to a request for completions that are not what was asked for."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from typing import Any

from tests.support.answers import Edit, counted, edited, ids, logprobs, status
from tests.support.fake_server import DIALECTS, Answer, FakeServer, Raw

Change = Callable[[FakeServer, Answer], Answer]
_OK = b"HTTP/1.1 200 OK\r\n"


def _raw(content: bytes, pause: float = 0.0) -> Change:
    return lambda server, answer: (200, Raw(content, pause))


def _body(content: bytes, headers: bytes = b"", line: bytes = _OK) -> Change:
    return _raw(line + headers + b"Content-Length: %d\r\n\r\n" % len(content) + content)


def _chunked(chunks: bytes) -> Change:
    return _raw(_OK + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)


def _redirect(to: bytes, code: int = 302) -> Change:
    return _body(b"", b"Location: " + to + b"\r\n", b"HTTP/1.1 %d X\r\n" % code)


def _to_itself(server: FakeServer, answer: Answer) -> Answer:
    return _redirect(DIALECTS[server.dialect].sample.encode(), 307)(server, answer)


def _each(edit: Edit) -> Change:
    """Change all completions of an answer."""

    def answer(server: FakeServer, right: Answer) -> Answer:
        for completion in DIALECTS[server.dialect].completions(right[1]):
            edit(server, completion)
        return right

    return answer


def _copies(server: FakeServer, right: Answer) -> Answer:
    """Give the longest completion k times, under the numbers 0 to k - 1."""
    dialect = DIALECTS[server.dialect]
    found = dialect.completions(right[1])
    longest = max(found, key=lambda completion: len(completion[dialect.ids]))
    copies = [{**longest, **({"index": one["index"]} if "index" in one else {})} for one in found]
    return 200, dialect.answer_with(copies)


def _other_prompt(server: FakeServer, completion: dict[str, Any]) -> None:
    if "prompt_token_ids" in completion:
        completion["prompt_token_ids"] = [*completion["prompt_token_ids"][:-1], 5, 6]
    else:
        completion["meta_info"]["prompt_tokens"] += 1


def _without_finish(server: FakeServer, completion: dict[str, Any]) -> None:
    completion.pop("finish_reason", None)
    completion.get("meta_info", {}).pop("finish_reason", None)


def _finish_of_another_kind(server: FakeServer, completion: dict[str, Any]) -> None:
    DIALECTS[server.dialect].set_finish(completion, 5)  # type: ignore[arg-type]


PASSING: dict[str, Change] = {
    # The protocol
    "a header over 8 KB": _body(b"{}", b"X: " + b"a" * 9000 + b"\r\n"),
    "thousands of headers": _body(b"{}", b"".join(b"X%d: a\r\n" % i for i in range(5000))),
    "a header with a NUL": _body(b"{}", b"X: a\x00b\r\n"),
    "a header without a colon": _body(b"{}", b"nonsense\r\n"),
    "a chunk size that is none": _chunked(b"zz\r\n{}\r\n0\r\n\r\n"),
    "a chunk too short": _chunked(b"5\r\n{}\r\n0\r\n\r\n"),
    "no last chunk": _chunked(b"2\r\n{}\r\n"),
    "a negative length": _raw(_OK + b"Content-Length: -5\r\n\r\n{}"),
    "two lengths": _raw(_OK + b"Content-Length: 5\r\nContent-Length: 2\r\n\r\n{}"),
    "a longer length": _raw(_OK + b"Content-Length: 50\r\n\r\n{}"),
    "another protocol": _raw(b"SSH-2.0-OpenSSH\r\n"),
    "a status that is no number": _raw(b"HTTP/1.1 abc OK\r\n\r\n"),
    "a status of 999": _body(b"{}", line=b"HTTP/1.1 999 X\r\n"),
    "a reason that is no text": _body(b"{}", line=b"HTTP/1.1 200 \xff\xfe\r\n"),
    "a later HTTP": _body(b"{}", line=b"HTTP/3.0 200 OK\r\n"),
    "gzip that is none": _body(b"{}", b"Content-Encoding: gzip\r\n"),
    "gzip cut off": _body(gzip.compress(b"{}" * 500)[:20], b"Content-Encoding: gzip\r\n"),
    "no content": _raw(b"HTTP/1.1 204 X\r\n\r\n"),
    "a redirect to a file": _redirect(b"file:///etc/hostname"),
    "a redirect to half an address": _redirect(b"http://[::1"),
    "a redirect to nobody": _redirect(b"http://127.0.0.1:9/"),
    "a status of 425": status(425),
    "a pause that is no number": _body(b"", b"Retry-After: Wed, 21 Oct 2037 07:28:00 GMT\r\n", b"HTTP/1.1 503 X\r\n"),
    # The body
    "deep nesting": status(200, b"[" * 200_000),
    "deep nesting in an error": status(500, b'{"error":' * 20_000),
    "not UTF-8": status(200, b'["\xff"'),
    "another charset": _body(b'{"choices": 5}', b"Content-Type: application/json; charset=rot13\r\n"),
    "a number of 5000 digits": status(200, b'{"choices": ' + b"1" * 5000 + b"}"),
    "events": status(200, b'data: {"choices": []}\n\ndata: [DONE]\n\n'),
    "a list of lists": status(200, [[1], [2]]),
    # The completions
    "copies of one": _copies,
    "another prompt's": _each(_other_prompt),
    "fractional tokens": ids(lambda tokens: [tokens[0] + 0.5, *tokens[1:]]),
    "tokens as floats": ids(lambda tokens: [float(token) for token in tokens]),
    "tokens as text": ids(lambda tokens: [str(token) for token in tokens]),
    "tokens as one text": ids(lambda tokens: "".join(str(token % 10) for token in tokens)),
    "true as a token": ids(lambda tokens: [True, *tokens[1:]]),
    "negative tokens": ids(lambda tokens: [-1, *tokens[1:]]),
    "log-probabilities as text": logprobs(lambda values: [str(value) for value in values]),
    "infinite log-probabilities": logprobs(lambda values: [float("-inf"), *values[1:]]),
    "no finish": edited(_without_finish),
    "a finish of another kind": edited(_finish_of_another_kind),
    "completions twice": counted(lambda found: [*found, *found]),
}
LASTING: dict[str, Change] = {
    "switches protocols": _body(b"", line=b"HTTP/1.1 101 X\r\n"),
    "a redirect to nowhere": _body(b"", line=b"HTTP/1.1 302 X\r\n"),
    "not modified": _body(b"", line=b"HTTP/1.1 304 X\r\n"),
    "login needed": status(401, b"<html>log in</html>"),
    "deep nesting in a refusal": status(400, b'{"error":' * 20_000),
}
FOLLOWED: dict[str, Change] = {"a redirect to itself": _to_itself}
SLOW: dict[str, Change] = {"a byte now and then": _raw(_OK + b"Content-Length: 500\r\n\r\n" + b" " * 500, 0.05)}
