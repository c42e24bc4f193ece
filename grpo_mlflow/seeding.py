"""One rule that turns (seed, purpose, indices...) into an independent random stream.

Streams are keyed, never advanced: the draws of iteration 7 do not depend on whether iteration 6 ran in this
process, so nothing about random state needs to be saved to resume a run exactly.
"""

from __future__ import annotations

import hashlib

import numpy as np


def _digest(seed: int, key: tuple[str | int, ...]) -> bytes:
    # repr keeps 1 and "1", and ("ab", "c") and ("a", "bc"), apart; int() because that of NumPy's integers differs
    plain = tuple(part if isinstance(part, str) else int(part) for part in (seed, *key))
    return hashlib.blake2b(repr(plain).encode(), digest_size=16).digest()


def stream(seed: int, *key: str | int) -> np.random.Generator:
    """Return a generator that depends on all of `seed` and `key` and on nothing else."""
    return np.random.Generator(np.random.PCG64(int.from_bytes(_digest(seed, key), "little")))


def integer(seed: int, *key: str | int) -> int:
    """Return a 63-bit integer for libraries that take a seed, keyed as in `stream`."""
    return int.from_bytes(_digest(seed, key)[:8], "little") >> 1
