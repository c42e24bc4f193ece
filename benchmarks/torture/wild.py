"""Texts that hurt: values, words, and what is left of a text after an accident."""

from __future__ import annotations

import random

Draws = random.Random
_DEEP = 3000
_SHORT = """
null ~ true false yes on nan .nan inf -.inf 0 -0.0 -1 1 2 3 1e-6 1e308 1e309 -1e400 5e-324 9223372036854775808 0x10
1_000 0o17 1:30 2020-01-01 2020-01-01T00:00:00Z 1. .5 +1 1,5 ½ ٣ abc ' " 'a' \\ [] [1] [1,2,4] [1, ] [[1]]
[null] [nan] [1,a] [1,1] [-1] [0] [true] {} {a:1} {1: {.:1} !!int &a *a <<:1 %YAML #x | > ${ENV:HOME} ${ENV:}
${ENV:NOT_SET} ${ENV: ${ENV:HOME}${ENV:HOME} $HOME ${seed} {{x}} %s . .. / /dev/null /dev/full /proc/self/mem /nowhere/x
~/x a/../b - -- C:\\x a%20b http://[::1 http:// http://a:b@c:99999/x http://127.0.0.1:1 ftp://x file:///etc sqlite:///
x:// python:: python:os:system python:a:b:c python:os python:.:x python:json:JSONDecoder mix sat gsm8k arithmetic tiny
reasoning_gym/ reasoning_gym/chain_sum reasoning_gym/../x sqlite:///x.db journal:x postgresql://x runs:/x
"""
_SPACED = """
[1, 2, 4]
{a: 1}
{a: {b: 1}}
{1: 2}
{a: 1
{? [1] : 2}
{a: 1, a: 2}
{'': 1}
{null: 1}
{<<: {a: 1}}
&a [*a]
&a 1
!x 1
!!set {a}
!!binary aaaa
!!int x
!!timestamp 1
!!python/name:os.system
!!python/object/apply:os.system [touch planted]
{arithmetic: 1}
{arithmetic: 0}
{sat: -1, arithmetic: .nan}
{mix: 1}
{arithmetic: 1, sat: 2}
{x: y}
{reasoning_gym/chain_sum: 1}
{min_terms: 3}
{seed: 1}
{size: -1}
"""
_SPACES = """
[1e-5,1e-4]
{low: 1, high: 2}
{low: 2, high: 1}
{low: 0, high: 1, log: true}
{low: 1, high: 9, step: 0}
{low: 1, high: 9, step: 2}
{low: nan, high: 1}
{low: a, high: b}
{low: 1}
{when: {seed: [1]}}
[1,2,3]
{low: 1, high: 2, when: {train.epochs: [2]}}
{low: 1, high: 2, when: 1}
{low: -1e308, high: 1e308}
{choices: [1, 2]}
{low: 1, high: 1}
{low: 1, high: 2, x: 3}
{low: 1.0e-5, high: 1.0e-3, log: true}
"""
_LONG = ("[" * _DEEP, "{a: " * _DEEP, "[" * _DEEP + "]" * _DEEP, "- " * _DEEP, "(" * _DEEP, "1 " * 30_000, "a" * 10_000)
_CONTROL = ("a\nb", "a\tb", "a\rb", "\x1b[31m", "\x7f", "\u2028", "\ufeff", "\ud800", "\U0001f600", "e\u0301")
VALUES = (
    "",
    " ",
    "--- 1\n--- 2",
    "1" * 99,
    "1" * 5000,
    *_SHORT.split(),
    *_SPACED.strip().splitlines(),
    *_LONG,
    *_CONTROL,
)
"""Values of settings, in YAML or not."""
DIMENSIONS = (*_SPACES.strip().splitlines(), *VALUES)
"""What a setting may be said to vary over."""
WORDS = (
    *VALUES,
    "seed",
    "train",
    "train.lr",
    "a.b.c",
    "..a",
    "a..b",
    "\u00e9=1",
    "a=b=c",
    "=",
    "==",
    "a=",
    "=b",
    "a b",
)
"""Words of a command line."""
_LETTERS = "aZ0-+.:,=[]{}()'\"\\/#&*!|>%@`~$<_ \t\n\0\x1b\u00e9\u0663\u2028\ufeff\ud800\U0001f600"


def mutated(text: str, draws: Draws) -> str:
    """Return a text with something of it lost, doubled, changed, in another place, or with another put in."""
    for _ in range(draws.choice((1, 1, 2, 5))):
        start, end = sorted((draws.randint(0, len(text)), draws.randint(0, len(text))))
        way, letter = draws.randrange(7), draws.choice(_LETTERS)
        if way == 0:
            text = text[:start] + text[start + 1 :]
        elif way == 1:
            text = text[:start] + letter + text[start:]
        elif way == 2:
            text = text[:start] + letter + text[start + 1 :]
        elif way == 3:
            text = text[:end] + text[start:end][:5000] + text[end:]
        elif way == 4:
            text = text[:start] + text[end:]
        elif way == 5:
            text = text[end:] + text[start:end] + text[:start]
        else:
            text = text.swapcase()
    return text
