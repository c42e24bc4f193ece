"""What both sides of `benchmarks.compare_trl` are given; imports nothing beyond the standard library.

A side is a process that takes turns: it prints `ready`, and for each line `go` on its stdin it runs one iteration and
prints `done SECONDS CPU_SECONDS`; when stdin ends it prints `facts` with a JSON object and leaves.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

KL_COEF = 0.05
LR = 1e-6
_SHOTS = [(23, 14), (61, 8), (37, 45), (90, 6), (18, 29), (52, 33), (7, 76), (44, 21)]


@dataclass(frozen=True)
class Workload:
    """An iteration: `prompts` x `k` completions of at most `tokens` tokens, `flat` of the groups without a signal."""

    name: str
    model: str  # tiny or smollm2
    long: bool  # eight worked examples before the question, about 120 tokens of SmolLM2
    prompts: int
    k: int
    tokens: int
    fixed: bool  # every completion has exactly `tokens` tokens
    flat: float = 0.0

    def prompt(self, number: int) -> str:
        """Return the text of problem `number`."""
        a, b = 10 + 37 * number % 90, 10 + 53 * number % 90
        if not self.long:
            return f"{a}+{b}="
        shots = "".join(f"What is {x}+{y}? The answer is {x + y}.\n" for x, y in _SHOTS)
        return f"{shots}What is {a}+{b}? The answer is"

    def is_flat(self, number: int) -> bool:
        """Return whether all completions of the problem earn the same; evenly spread over the problems."""
        return int((number + 1) * self.flat + 1e-9) > int(number * self.flat + 1e-9)

    def reward(self, number: int, completion: str) -> float:
        """Return a value that is as good as random, so that the work does not depend on what was learnt."""
        if self.is_flat(number):
            return 0.5
        return int.from_bytes(hashlib.blake2b(completion.encode(), digest_size=4).digest(), "big") / 2**32


WORKLOADS = [
    Workload("tiny, short prompts", "tiny", False, 8, 8, 32, True),
    Workload("tiny, long prompts", "tiny", True, 8, 8, 32, True),
    Workload("SmolLM2-135M, long prompts, ragged, 40% flat", "smollm2", True, 2, 8, 32, False, 0.4),
    Workload("SmolLM2-135M, long prompts", "smollm2", True, 4, 8, 32, True),
]


class Turn:
    """The clocks of one iteration: wall time, and processor time of all threads, which other processes disturb less."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def done(self) -> None:
        """End the turn."""
        print(f"done {time.perf_counter() - self._wall} {time.process_time() - self._cpu}", flush=True)


def turns() -> Iterator[Turn]:
    """Yield once for each turn that the other end of stdin gives."""
    print("ready", flush=True)
    for _ in sys.stdin:
        yield Turn()


def leave(**facts: Any) -> None:
    """Print the facts of this side."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("facts", json.dumps({**facts, "rss_mb": peak}), flush=True)


def main(side: Callable[[Workload, str, int, int, str], None]) -> None:
    """Run a side: INDEX MODEL_FOLDER THREADS ITERATIONS DTYPE."""
    index, folder, threads, iterations, dtype = sys.argv[1:]
    side(WORKLOADS[int(index)], folder, int(threads), int(iterations), dtype)
