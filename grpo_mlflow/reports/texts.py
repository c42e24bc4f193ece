"""Texts of any origin, safe inside a page: prompts and answers of a model may hold whatever bytes they like."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from typing import Any

from grpo_mlflow.redaction import redact

MOST = 4000  # characters of one text; a page of endless answers would not open
# Controls but tab and newline, halves of surrogate pairs, which no file holds, and what turns the order of text around.
_UNSHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: str) -> str:
    """Return a text as a page shows it: without known secrets, unshown characters as escapes, its middle cut out.

    >>> plain("a\\x00b\\ud800")
    'a\\\\x00b\\\\ud800'
    """
    text = redact(text.replace("\r\n", "\n"))
    if (more := len(text) - MOST) > 0:
        text = f"{text[: MOST // 2]} … {more} characters left out … {text[-MOST // 2 :]}"
    return _UNSHOWN.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def escaped(value: object) -> str:
    """Return a value as text between tags, or in a quoted attribute."""
    return html.escape(plain(str(value)))


def embedded(content: object) -> str:
    """Return JSON for a script element, which nothing in it can end: texts as `plain` gives them, keys as they are."""
    text = json.dumps(_plain(content), allow_nan=False, separators=(",", ":"))  # and ASCII alone
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plain(content: Any) -> Any:
    if isinstance(content, str):
        return plain(content)
    if isinstance(content, Mapping):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return content if content and isinstance(content[0], (int, float)) else [_plain(value) for value in content]
    return content
