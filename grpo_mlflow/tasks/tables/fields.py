"""What a row asks and what is right: a column, a template with columns, or a column of chat messages.

`data.question` names the field `question` of the object in column `data`, where no column has that name.
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Mapping
from typing import Any

from grpo_mlflow.errors import ConfigError

Messages = tuple[Mapping[str, str], ...]
PROMPT, ANSWER = "data.rows.prompt", "data.rows.answer"
_DEFAULT_ANSWER = "answer"
_ROLES = ("system", "user", "assistant")


class Unfit(ValueError):
    """A row is none that can be asked: the setting, its value, and what is wrong in this row."""

    def __init__(self, key: str, value: str, what: str) -> None:
        super().__init__(what)
        self.start, self.what = f"{key} = {value!r}", what


class Form:
    """How rows are read: `prompt` is a column or a template, `answer` a column (None: `answer`, where there is one)."""

    def __init__(self, prompt: str, answer: str | None) -> None:
        self._prompt, self._answer = prompt, answer
        self._pieces = _pieces(prompt)

    def messages(self, row: Mapping[str, Any]) -> tuple[Messages, bool]:
        """Return the prompt of a row, and whether the row has it as chat messages.

        Raises:
            Unfit: the row has none.
        """
        if self._pieces and not (isinstance(row, Mapping) and self._prompt in row):
            text = "".join(before + self._filled(row, name) for before, name in self._pieces)
            return self._asked(text), False
        value = self._value(PROMPT, self._prompt, row, self._prompt)
        if isinstance(value, list):
            return self._chat(value), True
        return self._asked(self._text(value, self._prompt)), False

    def answer(self, row: Mapping[str, Any]) -> Any:
        """Return the right answer of a row: a text, a number, or a list of those; None where rows have no answers.

        Raises:
            Unfit: the row has none.
        """
        name = self._answer
        if name is None:
            if _DEFAULT_ANSWER not in row:
                return None
            name = _DEFAULT_ANSWER
        value = self._value(ANSWER, name, row, name)
        listed = value if isinstance(value, list) else [value]
        if not listed or not all(_is_answer(each) for each in listed):
            raise Unfit(
                ANSWER, name, f"is {_shown(value)}; allowed: a text, a number, or a list of these, none of them empty"
            )
        return value

    def _filled(self, row: Mapping[str, Any], name: str | None) -> str:
        return "" if name is None else self._text(self._value(PROMPT, self._prompt, row, name), name)

    def _value(self, key: str, setting: str, row: Mapping[str, Any], name: str) -> Any:
        if not isinstance(row, Mapping):
            raise Unfit(key, setting, f"the row is {_shown(row)}; allowed: an object with columns")
        found = _look_up(row, name)
        if found is _ABSENT:
            columns = ", ".join(map(str, row)) or "none"
            template = f", or a template such as '{{{next(iter(row))}}}'" if key == PROMPT and row else ""
            allowed = f"; allowed: {key}=COLUMN with one of these{template}" if row else ""
            raise Unfit(key, setting, f"there is no column {name!r}; there are: {columns}{allowed}")
        if found is None or (isinstance(found, float) and not math.isfinite(found)):
            raise Unfit(key, setting, f"the column {name!r} is null")
        return found

    def _text(self, value: Any, name: str) -> str:
        if isinstance(value, str):
            return value
        if isinstance(value, (dict, list)):
            if not self._pieces:
                raise Unfit(
                    PROMPT, self._prompt, f"the column {name!r} is {_shown(value)}; allowed: a text or messages"
                )
            return json.dumps(value, ensure_ascii=False)
        return as_text(value)

    def _asked(self, text: str) -> Messages:
        self._require_text(text)
        return ({"role": "user", "content": text},)

    def _require_text(self, text: str) -> None:
        if not text.strip():
            raise Unfit(PROMPT, self._prompt, "the prompt is empty")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Unfit(PROMPT, self._prompt, "the prompt holds half of a surrogate pair, which is no text") from None

    def _chat(self, value: list[Any]) -> Messages:
        found: list[Mapping[str, str]] = []
        for each in value:
            role, content = (each.get("role"), each.get("content")) if isinstance(each, dict) else (None, None)
            if role not in _ROLES or not isinstance(content, str):
                allowed = f"objects with a role ({', '.join(_ROLES)}) and a content, a text"
                raise Unfit(PROMPT, self._prompt, f"holds {_shown(each)}; allowed: {allowed}")
            found.append({"role": role, "content": content})
        if not found or found[-1]["role"] != "user":
            what = f"ends with a message of the {found[-1]['role']}" if found else "holds no message"
            raise Unfit(PROMPT, self._prompt, f"{what}; allowed: messages of which the last is the user's")
        self._require_text("".join(message["content"] for message in found))
        return tuple(found)


def as_text(value: Any) -> str:
    """Return a value as a model would write it: 3 for 3.0, which is what a table makes of 3 beside a null."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _pieces(prompt: str) -> list[tuple[str, str | None]]:
    """Return the texts of a template, each with the column that follows it (None: no further); empty: no template.

    Raises:
        ConfigError: its braces do not match, or hold more than a column.
    """
    if "{" not in prompt and "}" not in prompt:
        return []
    try:
        parsed = list(string.Formatter().parse(prompt))
    except ValueError as error:
        raise ConfigError(f"{PROMPT} = {prompt!r}: {error}; allowed: {{COLUMN}}, and {{{{ for a brace") from None
    for _, name, form, conversion in parsed:
        if name is not None and (not name.strip() or form or conversion):
            shown = f"{name}{f'!{conversion}' if conversion else ''}{f':{form}' if form else ''}"
            raise ConfigError(f"{PROMPT} = {prompt!r}: {{{shown}}} is no column; allowed: {{COLUMN}}, {{{{ for a brace")
    return [(before, name) for before, name, _, _ in parsed]


_ABSENT = object()


def _look_up(row: Mapping[str, Any], name: str) -> Any:
    if name in row:
        return row[name]
    outer, dot, inner = name.partition(".")
    if dot and isinstance(row.get(outer), Mapping):
        return _look_up(row[outer], inner)
    return _ABSENT


def _is_answer(value: object) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value))


def _shown(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:60]}... ({type(value).__name__})"
