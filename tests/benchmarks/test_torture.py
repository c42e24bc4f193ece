"""The harness that kills runs: it sees what is lost, doubled or left, and a few real kills leave what they should."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from benchmarks.torture import long, mutations, texts, works
from benchmarks.torture.history import differences
from benchmarks.torture.moments import Region, Watch
from grpo_mlflow.config import Resolved, resolve
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
        thread = threading.Thread(target=_inner)
        thread.start()
        thread.join()
    finally:
        threading.settrace(None)
        sys.settrace(before)
    return watch.moments["here"]


def test_moments_are_those_of_a_region_and_of_what_it_calls() -> None:
    assert _count(Region([_inner])) == 6  # a line and a return, thrice, once in a thread
    assert _count(Region([_outer])) == 4  # its own, and those of the one that it calls
    assert _count(Region([_outer], [_inner])) == 2


def test_a_command_that_ends_as_it_should_has_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (["train.lr=1e-5"], ["train.lr=x", "seed=-1"], ["--config", "nowhere"], ["--help"], ["a" * 5000]):
        assert list(mutations.faults("train", words)) == []


@pytest.mark.parametrize(
    ("ends", "fault"),
    [
        (ValueError("a bug"), "said error: ValueError: a bug: a mistake of the program"),
        (SystemExit(1), "ended with 1 and without a line"),
        (SystemExit(7), "ended with 7"),
        (mutations.Hung(), "took more than 20 seconds"),
    ],
)
def test_a_command_that_does_not_is_told(
    ends: BaseException, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(argv: object) -> None:
        raise ends

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(mutations.COMMANDS, "broken", command)
    assert next(mutations.faults("broken", [])).startswith(fault)


def test_yaml_that_does_not_read_back_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = resolve("tiny")
    other = Resolved(resolved.config.model_copy(update={"seed": "1"}), resolved.origins, ())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(mutations.COMMANDS, "broken", lambda argv: (other,))
    (fault,) = mutations.faults("broken", [])
    assert fault.startswith("its YAML is refused: ")


def test_a_few_texts_are_judged(tmp_path: Path) -> None:
    record = texts.run(tmp_path, 0, 0, "sat", 40)
    assert (record.wrong, record.count, record.codes) == ([], 40, [0])
    assert list(tmp_path.iterdir()) == []


def looks(memory: float = 0.0, files: float = 0.0, cpu: float = 0.0) -> list[dict[str, float]]:
    """Looks at a run whose memory, files and time grow by so much from each to the next."""
    return [
        {
            **{"iteration": 50 * i, "wall": 0.5 * i, "cpu": 0.05 * i + cpu * i * i},
            **{"memory": 400 + memory * i, "files": 10 + files * i, "threads": 6},
        }
        for i in range(100)
    ]


@pytest.mark.parametrize(
    ("grows", "told"),
    [({}, ""), ({"memory": 0.5}, "memory grows"), ({"files": 0.1}, "files grow"), ({"cpu": 0.01}, "time grows")],
)
def test_what_grows_in_a_long_run_is_told(grows: dict[str, float], told: str) -> None:
    found = long.grown(long.figures(looks(**grows)))
    assert len(found) == bool(told)
    assert all(line.startswith(told) for line in found)


@pytest.mark.slow
def test_a_long_run_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    works.prepare(tmp_path)
    record = long.run(tmp_path, 0, 800)
    assert record.codes == [0]
    assert record.figures["memory_late"] > 100
    assert record.figures["files_late"] > 3
    assert record.figures["ms_cpu_late"] > 0


@pytest.mark.slow
def test_killed_runs_leave_what_an_undisturbed_one_leaves(tmp_path: Path) -> None:
    words = ["--only", "|".join(POINTS), "--cases", str(len(POINTS)), "--outages", "0", "--output", str(tmp_path)]
    words += ["--mutations", "250"]
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.torture", *words], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [record["point"] for record in records] == [*POINTS, "config: mutations"]
    assert all(record["struck"] and not record["wrong"] and not record["differences"] for record in records)
