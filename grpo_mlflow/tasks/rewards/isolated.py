"""Built-in rewards that may hang on a text, or want the main thread: they run as functions of the user's own do.

This file is loaded by its path in a process of its own, so it imports nothing of the package.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

_SECONDS = 2  # for one text or answer; what takes longer, such as 9^9^9^9, is not the right answer
_TAGGED = re.compile(r"<SOLUTION>(.*?)</SOLUTION>", re.DOTALL)


def regex(completions: Sequence[str], pattern: str, full: bool = False, **kwargs: Any) -> list[float]:
    """1 if the pattern is found in the text, or with `full` is the whole of it without the white space around it."""
    compiled = re.compile(pattern, re.DOTALL)
    texts = map(_text, completions)
    return [float(bool(compiled.fullmatch(text.strip()) if full else compiled.search(text))) for text in texts]


def json_schema(completions: Sequence[str], schema: Any, **kwargs: Any) -> list[float]:
    """1 if the text, or its only fenced block, is JSON that the schema takes."""
    from jsonschema.validators import validator_for

    validator = validator_for(schema)(schema)
    return [float(_is_valid(_text(completion), validator)) for completion in completions]


def mathematics(completions: Sequence[str], answers: Sequence[Any], **kwargs: Any) -> list[float | None]:
    """1 if math-verify calls the text's last expression equal to an answer; None for a row without an answer."""
    return [
        None if answer is None else float(_equals(_text(completion), answer if isinstance(answer, list) else [answer]))
        for completion, answer in zip(completions, answers, strict=True)
    ]


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _is_valid(text: str, validator: Any) -> bool:
    blocks = re.findall(r"```(?:json)?\s*\n(.*?)```", text, re.DOTALL)
    try:
        return bool(validator.is_valid(json.loads(blocks[0] if len(blocks) == 1 else text)))
    except (ValueError, RecursionError):
        return False


def _equals(text: str, answers: Sequence[Any]) -> bool:
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException

    def parsed(what: str) -> Any:
        return parse(what, parsing_timeout=_SECONDS, raise_on_error=True)

    def stated(what: str) -> Any:
        """What is nothing but the answer: without the signs math-verify finds numbers in it, but no formula."""
        return (parsed(f"${what}$") if "$" not in what and "\\boxed" not in what else None) or parsed(what)

    golds = []
    for answer in answers:
        golds.append(stated(str(answer)))
        if not golds[-1]:
            raise ValueError(f"the answer {answer!r} is no mathematics; use exact or contains for words")
    tagged = _TAGGED.findall(text)
    try:
        found = stated(tagged[0].strip()) if len(tagged) == 1 else parsed(text)
        return any(verify(gold, found, timeout_seconds=_SECONDS, raise_on_error=True) for gold in golds)
    except (TimeoutException, Exception):  # of a text, which may be anything; a timeout is a BaseException
        return False
