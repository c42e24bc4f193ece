"""Each tuned constant has a measurement, and its two ways are two ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.constants import FACTORS, MEASUREMENTS, SIZES, table
from benchmarks.two_ways import Case, Peak, compare
from grpo_mlflow.forward import tuning

NAMES = sorted(name for name in vars(tuning) if name.isupper())
SMALL = {
    **{"BLOCKED_FROM_ROWS": 64, "BLOCK_ROWS": 8, "JOINED_UP_TO_WEIGHTS": 256, "PREFIX_LONGEST_REST": 2},
    **{"ALONE_FROM_TOKENS": 32},
    **{"PLAIN_ATTENTION_SCORES": 32, "LOGITS_SLICE": 1 << 16, "KEPT_LOGPROBS": 1 << 16, "CACHE_GROWTH": 2},
    **{"SUMMED_NUMBERS": 128, "COPIED_TOKENS": 128},
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(tuning, name, value)


class Operations(TorchDispatchMode):
    """Notes every operation, with the shapes of its results."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.found.append((str(function), [part.shape for part in tree_leaves(result) if isinstance(part, Tensor)]))
        return result


def operations(case: Case, settings: Any) -> list[Any]:
    noted = Operations()
    with tuning.set_to(settings), noted:
        case.work()
    return noted.found


def test_every_constant_is_measured() -> None:
    assert sorted(MEASUREMENTS) == NAMES
    assert set(NAMES) >= SIZES


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", NAMES)
def test_both_ways_are_computed_and_differ(name: str) -> None:
    MEASUREMENTS[name](1.0).work()  # what is found out once per model is not part of either way
    for at in FACTORS:
        case = MEASUREMENTS[name](at)
        a, b = (operations(case, way[1]) for way in (case.a, case.b))
        assert (a == b) is (name in SIZES and at == 1)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["COPIED_TOKENS", "CACHE_GROWTH"])
def test_the_table_has_a_line_for_each_size(name: str) -> None:
    before = {name: getattr(tuning, name) for name in NAMES}
    head, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table([name], 0.0, fewest=1))
    assert len(lines) == (2 if name in SIZES else 3)
    for line in lines:
        cells = dict(zip(head[:3], line[:3], strict=True))
        assert (cells["constant"], cells["value"]) == (name, str(before[name]))
        a, b = line[3:6], line[6:9]
        assert a[0] != b[0]
        assert all(float(number) > 0 for number in (a[1], b[1]))
        assert all(float(number) >= 0 for number in (a[2], b[2]))
        assert line[9] == "even" or line[9].startswith(("A ", "B "))
    assert {name: getattr(tuning, name) for name in NAMES} == before


@pytest.mark.parametrize(
    ("takes", "winner"), [((100, 300), "A 3.00x"), ((300, 200), "B 1.50x"), ((100, 104), "even"), ((104, 100), "even")]
)
def test_the_faster_way_wins(takes: tuple[int, int], winner: str) -> None:
    now = 0.0

    def work() -> None:
        nonlocal now
        now += tuning.CACHE_GROWTH

    a, b = ((str(value), {"CACHE_GROWTH": value}) for value in takes)
    found = compare(Case("any", work, a, b), seconds=0.0, clock=lambda: now)
    assert found.ms == (1e3 * takes[0], 1e3 * takes[1])
    assert found.winner == winner


def test_memory_is_the_most_that_was_held_at_once() -> None:
    outside = torch.zeros(5000)
    with Peak() as peak:
        first = torch.zeros(1000)
        second = first + 1.0  # 8000 bytes with the first
        del first
        view = second.view(10, 100)
        view += outside[:1000].view(10, 100)
        third = torch.zeros(500)  # 6000 bytes with the second
    del second, third
    assert peak.most == 8000
