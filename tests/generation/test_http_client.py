"""The HTTP client's border: whatever comes back is an answer, a fault or a refusal, in time, and in one line."""

from __future__ import annotations

import time
from typing import Any

import pytest

from grpo_mlflow.errors import UserError
from grpo_mlflow.runtime.http.client import Client, Fault, Loop, Refusal
from tests.support.raw_server import RawServer

OK = b"HTTP/1.1 200 OK\r\n"


def answer(content: bytes, headers: bytes = b"", status: bytes = OK) -> bytes:
    return status + headers + b"Content-Length: %d\r\n\r\n" % len(content) + content


def outcome(url: str, timeout: float = 5.0) -> Any:
    """Return the answer, or the error that stands for it."""
    loop, client = Loop(), Client(url, timeout)
    try:
        return loop.run(client.post("/v1/completions", {"prompt": [1]}))
    except (Fault, Refusal) as error:
        return error
    finally:
        loop.close(client.close)


FAULTS = {
    "a header over 8 KB": answer(b"{}", b"X: " + b"a" * 9000 + b"\r\n"),
    "thousands of headers": answer(b"{}", b"".join(b"X%d: a\r\n" % i for i in range(5000))),
    "a header with a NUL": answer(b"{}", b"X: a\x00b\r\n"),
    "a header without a colon": answer(b"{}", b"nonsense\r\n"),
    "a chunk size that is none": OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "a chunk too short": OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{}\r\n0\r\n\r\n",
    "no last chunk": OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n",
    "a negative length": OK + b"Content-Length: -5\r\n\r\n{}",
    "two lengths": OK + b"Content-Length: 5\r\nContent-Length: 2\r\n\r\n{}",
    "another protocol": b"SSH-2.0-OpenSSH\r\n",
    "a status that is no number": b"HTTP/1.1 abc OK\r\n\r\n",
    "a reason that is no text": answer(b"{}", status=b"HTTP/1.1 200 \xff\xfe\r\n"),
    "a later HTTP": answer(b"{}", status=b"HTTP/3.0 200 OK\r\n"),
    "gzip that is none": answer(b"{}", b"Content-Encoding: gzip\r\n"),
    "deep nesting": answer(b"[" * 200_000),
    "deep nesting in an error": answer(b'{"error":' * 20_000, status=b"HTTP/1.1 500 X\r\n"),
    "a redirect to itself": answer(b"", b"Location: /v1/completions\r\n", b"HTTP/1.1 307 X\r\n"),
    "a redirect to a file": answer(b"", b"Location: file:///etc/hostname\r\n", b"HTTP/1.1 302 X\r\n"),
    "a redirect to half an address": answer(b"", b"Location: http://[::1\r\n", b"HTTP/1.1 302 X\r\n"),
    "an end before an answer": b"",
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_no_answer_may_pass(name: str) -> None:
    with RawServer(FAULTS[name]) as server:
        found = outcome(server.url)
    assert isinstance(found, Fault), found
    assert len(str(found).splitlines()) == 1
    assert str(found).startswith("/v1/completions")
    assert len(str(found)) < 400
    assert "in time" not in str(found)  # it did answer, or ended at once


@pytest.mark.parametrize("charset", [b"utf-99", b"rot13", b"idna", b"base64", b'"\x01"'])
def test_json_is_utf8_whatever_a_header_says(charset: bytes) -> None:
    kind = b"Content-Type: application/json; charset=" + charset + b"\r\n"
    with RawServer(answer('["é"]'.encode(), kind)) as server:
        found = outcome(server.url)
    assert found == ["é"] or (b"\x01" in charset and isinstance(found, Fault))


@pytest.mark.parametrize("status", [101, 302, 304, 400, 401, 403, 404, 501])
def test_what_stays_as_it_is_is_refused(status: int) -> None:
    with RawServer(answer(b"", status=b"HTTP/1.1 %d X\r\n" % status)) as server:
        found = outcome(server.url)
    assert isinstance(found, Refusal)
    assert found.status == status


@pytest.mark.parametrize("start", [b"", OK, answer(b"[" + b"1," * 500 + b"1]")[:60]])
def test_the_timeout_bounds_the_whole_answer(start: bytes) -> None:
    """One byte at a time keeps the connection busy, which is no answer yet."""
    with RawServer(start + answer(b"[" + b"1," * 500 + b"1]"), pause=0.1) as server:
        began = time.monotonic()
        found = outcome(server.url, timeout=0.5)
    assert time.monotonic() - began < 3
    assert isinstance(found, Fault)
    assert str(found) == "/v1/completions does not answer in time"


def test_a_chain_of_redirects_ends_soon() -> None:
    with RawServer(answer(b"", b"Location: /v1/completions\r\n", b"HTTP/1.1 307 X\r\n")) as server:
        outcome(server.url)
        assert len(server.requests) < 8


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_this_machine_is_reached_without_a_proxy(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with RawServer(answer(b'"right"')) as server, RawServer(answer(b'"of the proxy"')) as proxy:
        monkeypatch.setenv(variable, proxy.url)
        port = server.url.rsplit(":", 1)[1]
        assert [outcome(f"http://{host}:{port}") for host in ("127.0.0.1", "localhost", "0.0.0.0")] == ["right"] * 3
        assert not proxy.requests


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the SDK gives aiohttp a proxy's password in an old way
@pytest.mark.parametrize("status", [200, 403, 502])
def test_a_proxy_is_named(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    page = answer(b"{", status=b"HTTP/1.1 %d X\r\n" % status)
    with RawServer(page) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.replace("http://", "http://me:hunter2@"))
        found = outcome("http://server.invalid:8000")
        assert proxy.requests
    assert isinstance(found, (Fault, Refusal))
    assert proxy.url.removeprefix("http://") in str(found)
    assert "proxy" in str(found)
    assert "hunter2" not in str(found)


@pytest.mark.parametrize("proxy", ["http://[", "gopher://h:1", "http://h:99999999"])
def test_a_proxy_that_cannot_be_used_is_told_in_one_line(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", proxy)
    with pytest.raises((UserError, AssertionError)) as caught:
        assert isinstance(outcome("http://server.invalid:8000"), str)
    assert "Traceback" not in str(caught.value)


def test_a_key_that_ends_with_a_line_break_is_sent_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", " key-of-a-file\r\n")
    with RawServer(answer(b"1")) as server:
        assert outcome(server.url) == 1
        assert b"authorization: bearer key-of-a-file\r\n" in server.requests[0].lower()


@pytest.mark.parametrize("key", ["two\nlines", "schlüssel", "a\tb", "a\x7fb", "€"])
def test_a_key_that_no_header_takes_is_refused_without_being_shown(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="OPENAI_API_KEY") as caught:
        Client("http://127.0.0.1:1", 1.0)
    assert len(str(caught.value).splitlines()) == 1
    assert key not in str(caught.value)
    assert "allowed" in str(caught.value)
