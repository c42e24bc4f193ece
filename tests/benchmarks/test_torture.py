"""The harness that kills runs: it sees what is lost, doubled or left, and a few real kills leave what they should."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.torture.history import differences
from benchmarks.torture.moments import Region, Watch
from tests.support.paths import ROOT

POINTS = ("checkpoint: rename", "run: end", "resume: state")


@pytest.mark.parametrize(
    ("left", "expected"),
    [
        ({"loss": [[0, 1.0], [1, 0.5]]}, []),
        ({"loss": [[0, 1.0]]}, ["/loss: [[0, 1.0]] instead of [[0, 1.0], [1, 0.5]]"]),
        ({}, ["/loss: lost"]),
        ({"loss": [[0, 1.0], [1, 0.5]], "other": []}, ["/other: not in the undisturbed"]),
    ],
)
def test_a_history_that_differs_is_told(left: dict[str, object], expected: list[str]) -> None:
    assert differences({"loss": [[0, 1.0], [1, 0.5]]}, left) == expected


def _inner() -> None:
    pass


def _outer() -> None:
    _inner()


def _count(region: Region) -> int:
    watch, before = Watch({"here": region}, lambda name, moment: None), sys.gettrace()
    watch.start()
    try:
        _outer()
        _inner()
    finally:
        sys.settrace(before)
    return watch.moments["here"]


def test_moments_are_those_of_a_region_and_of_what_it_calls() -> None:
    assert _count(Region([_inner])) == 4  # a line and a return, twice
    assert _count(Region([_outer])) == 4  # its own, and those of the one that it calls
    assert _count(Region([_outer], [_inner])) == 2


@pytest.mark.slow
def test_killed_runs_leave_what_an_undisturbed_one_leaves(tmp_path: Path) -> None:
    words = ["--only", "|".join(POINTS), "--cases", str(len(POINTS)), "--outages", "0", "--output", str(tmp_path)]
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.torture", *words], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [record["point"] for record in records] == list(POINTS)
    assert all(record["struck"] and not record["wrong"] and not record["differences"] for record in records)
