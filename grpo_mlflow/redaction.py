"""The secrets that this process was given, and texts without them.

Secrets are told by where they stand: the password of an address, a query value such as `?token=`, what follows an
option such as `--api-key`, a setting or an environment variable of such a name. Once known, a value is replaced
wherever it turns up, however it is spelled there: other libraries decode, quote and escape what they were given.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar
from urllib.parse import parse_qsl, quote, quote_plus, unquote, unquote_plus

T = TypeVar("T")
HIDDEN = "***"
_NAMED = re.compile(
    r"(?:(?:api|access|secret|private|signing|subscription)[_-]?key|apikey"
    r"|(?<!eos)(?<!bos)(?<!pad)(?<!unk)(?<!sep)(?<!cls)(?<!mask)(?<!stop)[_-]token|^token|authtoken"
    r"|password|passwd|passphrase|pwd|secret|credentials?|authorization)$",
    re.IGNORECASE,
)
_QUERY = re.compile(r"(?:key|token|secret|password|passwd|pwd|sig|signature|auth|code)$", re.IGNORECASE)
# A token as a part of an address's path: names of models have no such runs of letters and digits.
_IN_PATH = re.compile(r"(?=[A-Za-z]*\d)(?=\d*[A-Za-z])[A-Za-z0-9]{16,}")
_ENVIRONMENT = re.compile(r"(?:_KEY|_TOKEN|_PASSWORD|_PASSWD|_SECRET)$|^(?:PGPASSWORD|HTTPS?_PROXY|ALL_PROXY)$")
_SHORTEST = 4
_LONG = 12  # from here on, no word of another meaning
_REFERENCE = re.compile(r"[^:]*:?\$\{ENV:\w+\}")

_shown: dict[str, str] = {}  # each known spelling, and what stands for it
_pattern: re.Pattern[str] | None = None


def learn(value: str, shown: str = HIDDEN) -> None:
    """Replace a value from now on by `shown`; a value that is a word or a small number is left to `without`.

    A password `grpo` would take the method's name out of a run's config. What stands for a reference stays so.
    """
    global _pattern
    value = value.strip()
    if _is_word(value) or value == HIDDEN or _REFERENCE.fullmatch(value):
        return
    if _shown.get(value, HIDDEN) != HIDDEN or _shown.get(value) == shown:
        return
    for spelling in _spellings(value):
        if len(spelling) >= _SHORTEST:
            _shown[spelling] = shown
    longest_first = sorted(_shown, key=len, reverse=True)
    # A short one may be part of a word that is no secret. After a backslash a letter belongs to it: \nsecret.
    whole = r"(?:(?<!\w)|(?<=\\[a-z])){}(?!\w)"
    parts = (re.escape(each) if len(each) >= _LONG else whole.format(re.escape(each)) for each in longest_first)
    _pattern = re.compile("|".join(parts))


def learn_from(name: str, value: Any) -> None:
    """Learn the secrets in a value (text, list or mapping) of this name."""
    if isinstance(value, str):
        _of_address(value)
        if _NAMED.search(name.rpartition(".")[2]):
            learn(value)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            learn_from(str(key), inner)
    elif isinstance(value, (list, tuple)):
        words = [str(word) for word in value]
        for before, word in zip(["", *words], words, strict=False):
            option, _, given = word.partition("=")
            if option.startswith("-") and _NAMED.search(option):
                learn(given)
            elif before.startswith("-") and _NAMED.search(before) and not word.startswith("-"):
                learn(word)
            _of_address(given or word)
        for inner in value:
            learn_from(name, inner)
    elif isinstance(value, int) and not isinstance(value, bool) and _NAMED.search(name.rpartition(".")[2]):
        learn(str(value))


def learn_environment(environment: Mapping[str, str] = os.environ) -> None:
    """Learn what stands in variables such as OPENAI_API_KEY, HF_TOKEN, PGPASSWORD and HTTP_PROXY."""
    for name, value in environment.items():
        if _ENVIRONMENT.search(name.upper()):
            _of_address(value)
            if "://" not in value and os.sep not in value and len(value.strip()) >= 2 * _SHORTEST:
                learn(value)


def redact(text: str) -> str:
    """Return the text without known secrets, and with the user and password of any address hidden."""
    if _pattern is not None:
        text = _pattern.sub(lambda match: _shown[match[0]], text)
    text = re.sub(r"(password=)(?!\$\{ENV:)[^&\s'\"]+", rf"\1{HIDDEN}", text)
    return re.sub(r"://([^\s'\"]*)@", _hide_user, text)


def without(value: T) -> T:
    """Return a value of JSON's types with all texts in it redacted, and what secrets' names stand before hidden."""
    found: Any = value
    if isinstance(value, str):
        found = redact(value)
    elif isinstance(value, Mapping):
        found = {key: _after(str(key), inner) for key, inner in value.items()}
    elif isinstance(value, (list, tuple)):
        before = ["", *(each if isinstance(each, str) and each.startswith("-") else "" for each in value)]
        found = type(value)(_after(name, inner) for name, inner in zip(before, value, strict=False))
    return found  # type: ignore[no-any-return]


def _after(name: str, value: Any) -> Any:
    """Return what stands after a name, as `without` does."""
    shown = without(value)
    plain = isinstance(value, (str, int)) and not isinstance(value, bool)
    is_given = plain and shown == value and value != "" and not str(value).startswith("-")
    return HIDDEN if is_given and _NAMED.search(name) and not _REFERENCE.fullmatch(str(value)) else shown


def is_secret_name(name: str) -> bool:
    """Return whether what goes by this name (a setting, an option) is a secret."""
    return _NAMED.search(name) is not None


def _is_word(value: str) -> bool:
    """Return whether a value is too short to be told from text that means something else."""
    kinds = (str.islower, str.isupper, str.isdigit, lambda each: not each.isalnum())
    return len(value) < _SHORTEST or (len(value) < _LONG and sum(any(map(kind, value)) for kind in kinds) < 2)


def _hide_user(match: re.Match[str]) -> str:
    return match[0] if _REFERENCE.fullmatch(match[1]) else f"://{HIDDEN}@"


def _of_address(value: str) -> None:
    scheme, found, rest = value.partition("://")
    if not found:
        return
    before, has_query, query = rest.partition("?")
    user, has_user, place = (before if "@" in before else rest).rpartition("@")
    if has_user and (":" in user or "/" not in user):
        name, has_password, password = user.partition(":")
        if has_password:
            learn(password)
        elif scheme.startswith("http"):
            learn(name)  # a token as the user
    if has_query:
        for key, given in parse_qsl(query):
            if _QUERY.search(key):
                learn(given)
    if scheme.startswith("http"):
        for part in (place or before).split("/")[1:]:
            if _IN_PATH.search(part):
                learn(part)


def _spellings(value: str) -> Iterable[str]:
    """Return how a value may be written: as given, decoded, for an address, and inside quotes of several languages."""
    for plain in {value, unquote(value), unquote_plus(value)}:
        yield from (plain, quote(plain), quote(plain, safe=""), quote_plus(plain))
        yield plain.replace("'", "'\"'\"'")  # as a shell's words have it, inside their quotes
        yield from (repr(plain)[1:-1], json.dumps(plain)[1:-1], plain.replace("'", "''"), plain.replace('"', '\\"'))
        yield " ".join(plain.split())
