"""Text as people and models write it, in one plain notation that `numerals` reads.

Unicode digits, dashes, spaces, fractions and superscripts become ASCII; LaTeX and Markdown around a number go. Three
characters keep what a reader needs to know: HARD is a space that cannot part two numbers (thin, no-break), an em dash
stays one, and ROOT is in the place of a function, such as a root, that makes another number of the one after it.

Every pattern is bounded, so no text takes long.
"""

from __future__ import annotations

import re
import unicodedata

HARD = "\u2009"
EM_DASH = "\u2014"
ROOT = "\u221a"

_TABLE = {
    "-": "\u2010\u2011\u2012\u2013\u2212\u2796\ufe63\u02d7",
    EM_DASH: "\u2015\ufe58",
    HARD: "\u00a0\u2007\u2008\u200a\u202f",
    "": "\u00ad\u200b\u200c\u200d\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2066\u2067\u2068\u2069\ufeff",
    ROOT: "\u221b\u221c\u2264\u2265\u2260\u00b1\u2213\u03c0\u221e",
    ".": "\u066b",
    ",": "\u066c",
    "'": "\u2019\u02bc",
    "/": "\u2044\u2215",
    "*": "\u2217\u22c5\u00b7",
    "\u00b0": "\u00ba",
}
_CHARACTERS = {0xFF01 + offset: chr(0x21 + offset) for offset in range(94)}  # full width
_CHARACTERS |= {ord(char): plain for plain, chars in _TABLE.items() for char in chars}
_SUPERSCRIPTS = dict(
    zip("\u207a\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079", "+-0123456789", strict=True)
)
_SUPER, _SUB = "".join(_SUPERSCRIPTS), "".join(chr(0x2080 + digit) for digit in range(10))
_SIGNS = "$\u20ac\u00a3\u00a5\u20b9\u20a9\u20bd\u00a2\u20ab\u20b1\u20aa\u20ba"
_CODES = "USD|EUR|GBP|INR|CAD|AUD|JPY|CNY|RMB|CHF|Rs\\.?|RM"
_FUNCTIONS = "sqrt|log|ln|exp|sin|cos|tan|pm|mp|[lg]eq?|neq?|overline|bar|binom|lfloor|lceil|[lr]vert|abs|pi|infty"
_TEXT = "text(?:bf|it|rm|tt|sf|sc|normal)?|math(?:bf|rm|it|sf|tt|bb|cal)|operatorname|[mh]box|num|underline|boldsymbol"
_FRAC = r"\\(?:[dtcs]|nice)?frac(?![A-Za-z])"
_PIECE = r"(?:\{([^{}]{0,120})\}|([0-9]))"


def _compiled(*rules: tuple[str, str]) -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in rules)


_AROUND = _compiled(
    # Markdown and HTML; what is struck out is not said
    (r"~~[^~\n]{1,200}~~", " "),
    (r"</?(?:b|i|u|em|strong|code|span)>", ""),
    (r"<sup>\s?([-+]?[0-9]{1,9})\s?</sup>", r"^\1"),
    (r"(?<![0-9)])\*\*|\*\*(?![0-9(])|`", ""),  # 2**3 is a power
    (r"(?<![A-Za-z0-9_])_{1,3}(?=[^_\s])|(?<=[^_\s])_{1,3}(?![A-Za-z0-9_{])", ""),
    # LaTeX: separators inside a number, functions, and text
    (r"\{([,.])\}", r"\1"),
    (r"\\([$%#&_])", r"\1"),
    (r"\\[ ~]|~(?=[^~0-9])", " "),
    (r"\\[,:;>]", HARD),
    (r"\\!", ""),
    (r"\\[()\[\]|]|\\\\", " "),
    (rf"\\(?:{_FUNCTIONS})(?![A-Za-z])", ROOT),
    (r"[<>!]=", ROOT),
    (r"\\(?:times|ast|cdot)(?![A-Za-z])", "*"),
    (r"\\div(?![A-Za-z])", "/ "),
    (r"\\(?:lor|vee)(?![A-Za-z])", " or "),
    (r"\\(?:left|right|[bB]igg?[lr]?|(?:display|text)style|rm|bf|it)(?![A-Za-z])", ""),
    (r"\^\s?(?:\{\s?\\(?:circ|degree|prime)\s?\}|\\(?:circ|degree|prime)(?![A-Za-z]))", "\u00b0"),
    (rf"(?<=[-+])\\(?:{_TEXT})\s?\{{([^{{}}]{{0,200}})\}}", r"\1"),
    (rf"\\(?:{_TEXT})\s?\{{([^{{}}]{{0,200}})\}}", r" \1"),
    # an index names a variable; after a digit it is the base of the number, and a bar or stroke changes it too
    (rf"(?<=[A-Za-z])[{_SUB}]{{1,9}}", ""),
    (rf"(?<=[0-9])(?:[{_SUB}]{{1,9}}|[\u0300-\u036f])", ROOT),
    # money
    (rf"(?<![0-9A-Za-z])(?:US|AU|CA|NZ|HK|[ACSR])?[{_SIGNS}][ {HARD}]{{0,3}}(?=[-+]?[0-9.\\])", ""),
    (rf"\b(?:{_CODES})[ {HARD}]{{0,3}}(?=[-+]?[0-9])", ""),
    (rf"[{_SIGNS}]", " "),
)
_FRACTION = re.compile(rf"(-?)\s?{_FRAC}\s{{0,2}}{_PIECE}\s{{0,2}}{_PIECE}(?P<more>[0-9])?")
_OVER = re.compile(r"(-?)\{([^{}\\]{1,120})\\over(?![A-Za-z])([^{}\\]{1,120})\}")
_SIGNED = re.compile(r"\s?([-+]?)\s?([0-9][0-9.,]{0,110}|\.[0-9]{1,110})\s?")
_REST = _compiled(
    (_FRAC, ROOT),
    (r"([\^_])\s?\{\s?([-+]?[0-9A-Za-z]{1,20})\s?\}", r"\1\2"),
    (r"([-+])\{", r"\1"),
    (r"\\[A-Za-z]{1,40}\*?", " "),
    (r"[{}&\\]", " "),
    # words
    (r"\b(?i:minus|negative)\s{1,3}(?=[-0-9.])", "-"),
    (r"(?<=[0-9])\s{1,3}and\s{1,3}(?:a|one)[ -]half\b", " 1/2"),
    (r"(?<=[0-9])\s{1,3}and\s{1,3}(?:a|one)[ -]quarter\b", " 1/4"),
    (r"(?<=[0-9])\s{1,3}and\s{1,3}three[ -]quarters\b", " 3/4"),
    (r"(?<=[0-9])\s{1,3}and\s{1,3}(?=[0-9]{1,3}/[0-9])", " "),
)


def plain(text: str) -> str:
    """Return the text in plain notation."""
    text = _ascii(text)
    for pattern, replacement in _AROUND:
        text = pattern.sub(replacement, text)
    for _ in range(2):  # one fraction may stand in another
        text = _FRACTION.sub(_fraction, text)
    text = _OVER.sub(lambda match: _ratio(match[1], match[2], match[3]), text)
    for pattern, replacement in _REST:
        text = pattern.sub(replacement, text)
    return text


def _ascii(text: str) -> str:
    if text.isascii():
        return text
    text = re.sub(r"(^|\n)(\s{0,9})\u2212\s{1,3}(?=[0-9.])", r"\1\2-", text)  # a minus sign begins no list
    text = text.translate(_CHARACTERS)
    text = re.sub(f"[{_SUPER}]{{1,9}}", lambda match: "^" + "".join(map(_SUPERSCRIPTS.__getitem__, match[0])), text)
    return re.sub(r"[^\x00-\x7f]", lambda match: _character(match[0]), text)


def _character(char: str) -> str:
    """Return a digit, fraction or space of Unicode in ASCII, and any other character as it is."""
    kind = unicodedata.category(char)
    if kind == "Nd":
        return str(unicodedata.decimal(char))
    if kind == "No" and unicodedata.decomposition(char).startswith("<fraction>"):
        return " " + unicodedata.normalize("NFKC", char).replace("\u2044", "/")
    return " " if kind == "Zs" and char != HARD else char


def _fraction(match: re.Match[str]) -> str:
    if match["more"]:  # \frac123 is a product
        return f" {ROOT}{match['more']}"
    ratio = _ratio(match[1], match[2] or match[3] or "", match[4] or match[5] or "")
    return ratio.lstrip() if match.string[match.start() - 1 : match.start()] == EM_DASH else ratio


def _ratio(sign: str, over: str, under: str) -> str:
    """Return a fraction in one line, its sign in front; one that is not of two numbers has no value."""
    top, bottom = _SIGNED.fullmatch(over), _SIGNED.fullmatch(under)
    if top is None or bottom is None:
        return f" {ROOT}({over})/{ROOT}({under}) "
    negative = [sign, top[1], bottom[1]].count("-") % 2 == 1
    return f" {'-' if negative else ''}{top[2]}/{bottom[2]}"
