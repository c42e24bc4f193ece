"""The same work done in two ways that the constants of `grpo_mlflow.forward.tuning` bring about: time and memory."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from grpo_mlflow.forward import tuning

_EVEN = 0.05  # ways whose times differ by less count as equally fast
Clock = Callable[[], float]
Way = tuple[str, Mapping[str, float]]  # a name, and the constants that bring the way about


@dataclass(frozen=True)
class Case:
    """Work of a size, and two ways to do it."""

    size: str
    work: Callable[[], object]
    a: Way
    b: Way


@dataclass(frozen=True)
class Found:
    """Milliseconds and bytes of way A and of way B, and how many times as long B takes (median over the turns)."""

    ms: tuple[float, float]
    peak: tuple[int, int]
    ratio: float

    @property
    def winner(self) -> str:
        """Return A, B, or even, with how many times as fast it is."""
        if max(self.ratio, 1 / self.ratio) < 1 + _EVEN:
            return "even"
        return f"A {self.ratio:.2f}x" if self.ratio > 1 else f"B {1 / self.ratio:.2f}x"


class Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that are made inside; `most` is the most that they held at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        self._held: dict[int, int] = {}  # address -> bytes; 0 for tensors from outside

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._note((args, kwargs), outside=True)  # a view or an in-place operation returns memory it was given
        result = function(*args, **(kwargs or {}))
        self._note(result, outside=False)
        self.most = max(self.most, sum(self._held.values()))
        return result

    def _note(self, tree: Any, outside: bool) -> None:
        for tensor in tree_iter(tree):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self._held:
                    self._held[storage.data_ptr()] = 0 if outside else storage.nbytes()
                    weakref.finalize(storage, self._held.pop, storage.data_ptr(), None)


def compare(case: Case, seconds: float, fewest: int = 3, most: int = 200, clock: Clock = time.perf_counter) -> Found:
    """Run each way once for its memory, then both in turns until they have taken so many seconds."""
    ways, peaks = (case.a[1], case.b[1]), []
    for way in ways:
        with tuning.set_to(way), Peak() as peak:
            case.work()
        peaks.append(peak.most)
    times: tuple[list[float], list[float]] = ([], [])
    while len(times[0]) < fewest or (len(times[0]) < most and sum(map(sum, times)) < seconds):
        for i in (0, 1) if len(times[0]) % 2 else (1, 0):
            with tuning.set_to(ways[i]):
                began = clock()
                case.work()
                times[i].append(clock() - began)
    ms = [1e3 * statistics.median(its) for its in times]
    ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
    return Found((ms[0], ms[1]), (peaks[0], peaks[1]), ratio)
