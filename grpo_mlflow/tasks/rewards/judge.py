"""A judge: a model behind an OpenAI-compatible server that grades texts by a rubric."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo_mlflow.errors import ServerFailed, redact
from grpo_mlflow.runtime.files import cache_root
from grpo_mlflow.runtime.functions import FunctionFailed
from grpo_mlflow.runtime.http.client import Client, Fault, Loop, Refusal, all_of
from grpo_mlflow.runtime.http.retries import Retries
from grpo_mlflow.tasks.rewards import rubric as rubrics
from grpo_mlflow.tasks.rewards.answers import Answers
from grpo_mlflow.types import Problem

_TRIES = 3  # of a question whose answer holds no score
_WITHOUT_FORMAT = (400, 404, 415, 422, 501)  # how servers refuse response_format


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The options of a judge. Seconds that are None are those of `generation`.

    `price` is for a million tokens, [of prompts, of answers]; `body` is added to each request, null taking a key out;
    `cache` is the folder of its answers.
    """

    base_url: str
    model: str
    rubric: str
    scale: Sequence[float] = (1.0, 5.0)
    api_key: str | None = None
    concurrency: int = 32
    timeout: float | None = None
    retry_seconds: float | None = None
    max_tokens: int = 1024
    price: Sequence[float] | None = None
    body: Mapping[str, Any] = field(default_factory=dict)
    cache: str | None = None

    def __post_init__(self) -> None:
        for name in ("base_url", "model", "rubric"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name).strip():
                raise ValueError(f"{name} = {getattr(self, name)!r}; allowed: a text")
        if not re.match(r"https?://[^/\s]+", self.base_url):
            raise ValueError(f"base_url = {redact(self.base_url)!r}; allowed: http://HOST:PORT/v1 or https://HOST/v1")
        if "completion" not in rubrics.fields(self.rubric):
            raise ValueError("rubric: does not name {completion}; allowed: a text with {completion}, {question}, ...")
        if not _numbers(self.scale, 2) or self.scale[0] >= self.scale[1]:
            raise ValueError(f"scale = {self.scale!r}; allowed: [LOW, HIGH]")
        if self.price is not None and not (_numbers(self.price, 2) and min(self.price) >= 0):
            raise ValueError(f"price = {self.price!r}; allowed: [OF PROMPTS, OF ANSWERS] for a million tokens")
        for name in ("concurrency", "max_tokens"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)!r}; allowed: 1 or more")
        for name, least in (("timeout", 0.001), ("retry_seconds", 0.0)):
            value = getattr(self, name)
            if value is not None and not (_numbers([value], 1) and value >= least):
                raise ValueError(f"{name} = {value!r}; allowed: seconds, or null: as generation.{name}")
        if not isinstance(self.body, Mapping):
            raise ValueError(f"body = {self.body!r}; allowed: a mapping")


@dataclass(slots=True)
class _Open:
    """What a judge has open once it was asked."""

    loop: Loop
    client: Client | None = None
    answers: Answers | None = None

    def close(self) -> None:
        self.loop.close(self._last)
        if self.answers is not None:
            self.answers.close()

    async def _last(self) -> None:
        if self.client is not None:
            await self.client.close()


class Judge:
    """Asks for the grade of each text once, `concurrency` at a time; what it has answered is not asked again.

    Args:
        name, key: its own, and that in messages.
        timeout, retry_seconds: those of `generation`.
    """

    def __init__(self, name: str, key: str, settings: Settings, timeout: float, retry_seconds: float) -> None:
        self._name, self._key, self._settings = name, key, settings
        self._timeout = timeout if settings.timeout is None else settings.timeout
        own = settings.retry_seconds is not None
        seconds = settings.retry_seconds if own else retry_seconds
        root = settings.base_url.rstrip("/")
        self._path = "/v1/chat/completions" if _is_root(root) else "/chat/completions"
        self._retries = Retries(root, float(seconds or 0.0), f"{key if own else 'generation'}.retry_seconds", "")
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._formats = True
        self._scale = float(settings.scale[0]), float(settings.scale[1])
        self._open: _Open | None = None
        self.counts: Counter[str] = Counter()

    def begin(self, problems: Sequence[Problem], texts: Sequence[str]) -> Future[list[float | None]]:
        """Begin to ask; the future may raise FunctionFailed, or UserError where the server gives no usable answer."""
        if self._open is None:
            self._open = _Open(Loop())
            weakref.finalize(self, self._open.close)
        return self._open.loop.start(self._scores(self._open, problems, texts))

    async def _scores(self, opened: _Open, problems: Sequence[Problem], texts: Sequence[str]) -> list[float | None]:
        if opened.answers is None:
            folder = self._settings.cache
            opened.answers = Answers(Path(folder).expanduser() if folder else cache_root() / "judges")
        if opened.client is None:
            root = self._settings.base_url
            opened.client = Client(root, self._timeout, self._settings.api_key)
        asked = list(enumerate(zip(problems, texts, strict=True)))
        return await all_of([self._score(opened, problem, text, place) for place, (problem, text) in asked])

    async def _score(self, opened: _Open, problem: Problem, text: str, place: int) -> float | None:
        try:
            messages = rubrics.messages(self._settings.rubric, self._scale, problem, text)
        except rubrics.Lacking:
            return None
        assert opened.answers is not None
        settings = self._settings
        asked = [settings.base_url, settings.model, settings.max_tokens, self._scale, dict(settings.body), messages]
        key = _digest(asked)
        async with self._locks.setdefault(key, asyncio.Lock()):  # the same text twice in a batch is one question
            if (known := opened.answers.get(key)) is not None:
                self.counts["judge_cached"] += 1
                return known
            async with self._slots:
                score, answer = await self._asked(opened, messages, place)
            opened.answers.put(key, score, answer)
            return score

    async def _asked(self, opened: _Open, messages: Sequence[Mapping[str, str]], place: int) -> tuple[float, str]:
        answer = ""
        for _ in range(_TRIES):
            try:
                answer = await self._retries.ask("the judge", lambda: self._request(opened, messages), _nothing)
            except ServerFailed as failed:
                raise ServerFailed(f"{self._key}: {redact(self._settings.base_url)}: {failed}") from failed
            except Refusal as refused:
                raise ServerFailed(f"{self._key}: {redact(self._settings.base_url)}: {refused}") from refused
            if (score := rubrics.score_of(answer, self._scale)) is not None:
                return score, answer
        low, high = self._scale
        shown = " ".join(answer.split())[:200]
        what = f"answers {shown!r}; allowed: JSON with a score from {low:g} to {high:g}"
        raise FunctionFailed(self._name, what, place)

    async def _request(self, opened: _Open, messages: Sequence[Mapping[str, str]]) -> str:
        settings = self._settings
        body: dict[str, Any] = {
            "model": settings.model,
            "messages": list(messages),
            "temperature": 0,
            "max_tokens": settings.max_tokens,
        }
        with_format = self._formats and "response_format" not in settings.body
        if with_format:
            body["response_format"] = rubrics.schema(self._scale)
        body = {name: value for name, value in {**body, **settings.body}.items() if value is not None}
        assert opened.client is not None
        try:
            answer = await opened.client.post(self._path, body)
        except Refusal as refused:
            if refused.status not in _WITHOUT_FORMAT or not with_format:
                raise
            self._formats = False  # once: a server that has none is not asked for it again
            return await self._request(opened, messages)
        return self._content(answer)

    def _content(self, answer: Any) -> str:
        """Return the text of an answer, or what it thought where a server takes all for thinking."""
        try:
            message, usage = answer["choices"][0]["message"], answer.get("usage") or {}
            content = message.get("content") or message.get("reasoning_content") or message.get("reasoning") or ""
            tokens = [int(usage.get(f"{kind}_tokens") or 0) for kind in ("prompt", "completion")]
        except (LookupError, TypeError, AttributeError, ValueError):
            raise Fault(f"{self._path} answers with what is no chat completion") from None
        self.counts["judge_requests"] += 1
        self.counts["judge_prompt_tokens"] += tokens[0]
        self.counts["judge_completion_tokens"] += tokens[1]
        return str(content)

    def figures(self) -> dict[str, float]:
        """Return what was asked since the last call, and what it cost."""
        counts, self.counts = self.counts, Counter()
        retries, self._retries.count = self._retries.count, 0
        names = ("judge_requests", "judge_cached", "judge_prompt_tokens", "judge_completion_tokens")
        found = {name: float(counts[name]) for name in names} | {"judge_retries": float(retries)}
        if self._settings.price is not None:
            of_prompts, of_answers = self._settings.price
            spent = counts["judge_prompt_tokens"] * of_prompts + counts["judge_completion_tokens"] * of_answers
            found["judge_cost"] = spent / 1e6
        return found


async def _nothing() -> None: ...


def _is_root(url: str) -> bool:
    """Return whether an address is that of a server, or its /v1, which the client leaves out."""
    return url.endswith("/v1") or "/" not in url.partition("://")[2]


def _digest(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _numbers(value: Any, count: int) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != count:
        return False
    return all(isinstance(each, (int, float)) and not isinstance(each, bool) and each - each == 0 for each in value)
