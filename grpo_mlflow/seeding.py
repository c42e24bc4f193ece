"""One rule that turns (seed, purpose, indices...) into an independent random stream.

Streams are keyed, never advanced: the draws of iteration 7 do not depend on whether iteration 6 ran in this
process, so nothing about random state needs to be saved to resume a run exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


def _text(seed: int, key: tuple[str | int, ...]) -> bytes:
    # repr keeps 1 and "1", and ("ab", "c") and ("a", "bc"), apart; int() because that of NumPy's integers differs
    plain = tuple(part if isinstance(part, str) else int(part) for part in (seed, *key))
    return repr(plain).encode()


def _digest(seed: int, key: tuple[str | int, ...]) -> bytes:
    return hashlib.blake2b(_text(seed, key), digest_size=16).digest()


def stream(seed: int, *key: str | int) -> np.random.Generator:
    """Return a generator that depends on all of `seed` and `key` and on nothing else."""
    return np.random.Generator(np.random.PCG64(int.from_bytes(_digest(seed, key), "little")))


def uniforms(seed: int, keys: Iterable[tuple[str | int, ...]], count: int) -> NDArray[np.float64]:
    """Return `count` numbers in [0, 1) for each key, (keys, count), keyed as in `stream`; fewer are the first of more.

    The output of SHAKE128 (FIPS 202) takes a tenth of the time of so many generators, which are slow to make.
    """
    drawn = b"".join([hashlib.shake_128(_text(seed, key)).digest(8 * count) for key in keys])
    words = np.frombuffer(drawn, dtype="<u8").reshape(-1, count)
    found: NDArray[np.float64] = (words >> np.uint64(11)) * 2.0**-53
    return found


def integer(seed: int, *key: str | int) -> int:
    """Return a 63-bit integer for libraries that take a seed, keyed as in `stream`."""
    return int.from_bytes(_digest(seed, key)[:8], "little") >> 1
