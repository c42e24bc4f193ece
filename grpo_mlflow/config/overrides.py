"""Overrides as people write them: `key=value`, several in one line."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from typing import Any

from grpo_mlflow import redaction
from grpo_mlflow.config import references, yaml12
from grpo_mlflow.config.keys import KEYS, LISTS, TEXT, TRAITS, flatten, short
from grpo_mlflow.config.mistakes import Mistakes
from grpo_mlflow.errors import ConfigError

_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
_ITEM = re.compile(rf"{_KEY.pattern}=")


def parse_overrides(items: Iterable[str]) -> dict[str, Any]:
    """Turn `key=value` items into dotted keys; values are YAML (`5e-6`, `'[1,2]'`, `null`).

    Raises:
        ConfigError: an item has no `=`, no key, a value that is not YAML, or a reference to what is not set.
    """
    mistakes = Mistakes()
    found = read_overrides(items, mistakes)
    mistakes.require_none()
    return found


def read_overrides(items: Iterable[str], mistakes: Mistakes) -> dict[str, Any]:
    """Return what `parse_overrides` does of the items that can be read, and note what is wrong with the others."""
    found: dict[str, Any] = {}
    for item in items:
        with mistakes.noted():
            found |= references.expanded(_override(item), "override")
    return found


def _override(item: str) -> dict[str, Any]:
    key, equals, text = item.partition("=")
    if any("\ud800" <= letter <= "\udfff" for letter in item):
        raise ConfigError(f"override {short(item)}: holds bytes that are no UTF-8; allowed: text")
    key = key.strip()
    if not equals or not _KEY.fullmatch(key):
        raise ConfigError(f"override {short(redaction.redact(item))}: expected key=value, such as train.lr=5e-6")
    is_list = key in LISTS and text.lstrip().startswith("[")
    if key in TEXT and not is_list:  # as it stands: a run id of digits is not a number, a colon no mapping
        value = None if text in ("", "~", "null") else text
    else:
        value = yaml12.load(text, f"override {_shown(key, item)}")
    return flatten({key: value})


def _shown(key: str, item: str) -> str:
    """Return an override for a message: where it cannot be read, it is not known what in it is secret."""
    return short(item) if _shows(key) else f"{key}=..."


def _shows(key: str) -> bool:
    """Return whether no secret belongs into a setting or section; one that is unknown may be a mistyped other."""
    inside = [name for name in KEYS if name == key or name.startswith(f"{key}.")]
    return bool(inside) and not any(TRAITS[name].secret for name in inside)


def split_overrides(text: str) -> list[str]:
    """Split one line of overrides as a shell does, but not at the spaces inside a value's brackets.

    Raises:
        ConfigError: a quote is not closed, or brackets hold spaces and quotes, which a shell would take away.
    """
    try:
        pieces = shlex.split(text)
    except ValueError as error:
        shows = all(map(_shows, (match[0][:-1] for match in _ITEM.finditer(text))))
        raise ConfigError(f"overrides{f' = {text!r}' if shows else ''}: {str(error).lower()}") from None
    found: list[str] = []
    for piece in pieces:
        if found and _is_open(found[-1]) and not _ITEM.match(piece):
            found[-1] += f" {piece}"
            if found[-1] not in " ".join(text.split()):
                raise ConfigError(
                    f"overrides: {found[-1].partition('=')[0]}: a value with spaces and quotes needs quotes "
                    "of its own, such as data.mix='{arithmetic: 0.7, sat: 0.3}'"
                )
        else:
            found.append(piece)
    return found


def _is_open(piece: str) -> bool:
    return piece.count("[") + piece.count("{") > piece.count("]") + piece.count("}")
