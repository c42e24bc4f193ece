"""A task of the user's own: the example of docs/own_task.md, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pytest

from grpo_mlflow import runs
from grpo_mlflow.config import resolve
from grpo_mlflow.errors import ConfigError
from grpo_mlflow.tasks import create
from tests.support.paths import DOCS
from tests.support.small_runs import SMALL

EXAMPLE = "python:reverse:Reverse"


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(DOCS))


def test_the_page_shows_the_file() -> None:
    lines = [f"    {line}".rstrip() for line in (DOCS / "reverse.py").read_text().splitlines()]
    assert "\n".join(lines) in (DOCS / "own_task.md").read_text()
    code = [line for line in lines if line.strip()]
    assert len(code) <= 25


def test_the_example_keeps_the_rules_of_tasks() -> None:
    task = create(EXAMPLE, {"length": 4})
    contents = {
        split: {task.problem(split, seed).messages[0]["content"] for seed in range(200)} for split in ("train", "eval")
    }
    assert not contents["train"] & contents["eval"]
    for seed in range(50):
        problem = task.problem("train", seed)
        assert task.verify(problem, task.reference_answer(problem)).reward == pytest.approx(1.0)
        assert not task.verify(problem, "").success
        assert not task.verify(problem, "zzzz").success


def test_the_example_trains(store: str) -> None:
    words = [*SMALL, f"tracking.uri={store}", f"data.task={EXAMPLE}", "data.settings={length: 2}", "train.iterations=2"]
    finished = runs.train(resolve("tiny", words))
    metrics = mlflow.MlflowClient(store).get_run(finished.run_id).data.metrics
    assert {"train/reward_correct", "train/reward_length", "eval/pass_at_1"} <= set(metrics)
    assert metrics["train/format_rate"] > 0


BASE = """
from grpo_mlflow.tasks import Task
from grpo_mlflow.types import Problem, Verdict
class Good(Task):
    name = "good"
    def problem(self, split, seed): return Problem(f"good/{split}/{seed}", seed, (), {})
    def verify(self, problem, text): return Verdict(float(text == "yes"), {}, text == "yes", text)
    def reference_answer(self, problem): return "yes"
"""


@pytest.mark.parametrize(
    ("source", "task", "settings", "fragments"),
    [
        ("", "python:nowhere_at_all:A", {}, ["nowhere_at_all cannot be imported", "ModuleNotFoundError"]),
        ("1 / 0", "python:mine:A", {}, ["mine cannot be imported", "ZeroDivisionError"]),
        ("def f(:", "python:mine:A", {}, ["mine cannot be imported", "SyntaxError"]),
        ("A = 3", "python:mine:A", {}, ["mine has no class A"]),
        (
            "class A: pass",
            "python:mine:A",
            {},
            ["A lacks name, phrases, reward_range, problem, verify", "allowed: a class with name"],
        ),
        (BASE + "class A(Task):\n    name = 'a'", "python:mine:A", {}, ["A lacks problem, verify, reference_answer"]),
        (BASE, "python:mine:Good", {"size": 1}, ["data.settings = {'size': 1}", "Good refuses", "'size'"]),
        (
            BASE + "class A(Good):\n    def reference_answer(self, problem): return 'no'",
            "python:mine:A",
            {},
            ["reference_answer of problem('train', 0) does not succeed"],
        ),
        (
            BASE + "import itertools\nn = itertools.count()\nclass A(Good):\n    def problem(self, split, seed):\n"
            "        return Problem(str(next(n)), seed, (), {})",
            "python:mine:A",
            {},
            ["problem('train', 0) is not always the same Problem"],
        ),
        (
            BASE + "class A(Good):\n    reward_range = 1, 0",
            "python:mine:A",
            {},
            ["A: reward_range = (1, 0)", "allowed: two finite numbers, the lower reward first"],
        ),
        (
            BASE + "class A(Good):\n    def verify(self, problem, text): raise KeyError('lost')",
            "python:mine:A",
            {},
            ["A fails on its own problem: KeyError: 'lost'"],
        ),
        (
            BASE + "class A(Good):\n    def verify(self, problem, text): return None",
            "python:mine:A",
            {},
            ["A: verify of the reference_answer of problem('train', 0) gave None; allowed: a Verdict"],
        ),
        (
            BASE + "class A(Good):\n    def verify(self, problem, text): return Verdict(1.0, None, True, text)",
            "python:mine:A",
            {},
            ["A: verify of the reference_answer of problem('train', 0) gave parts = None; allowed: numbers by name"],
        ),
        (
            BASE + "class A(Good):\n    def problem(self, split, seed): return Problem('a', seed, (), {'set': {1}})",
            "python:mine:A",
            {},
            ["A: problem('train', 0): its payload cannot be written as JSON: Object of type set", "what JSON can hold"],
        ),
        (
            BASE + "class A(Good):\n    def problem(self, split, seed): return Problem('a', seed, (), {(1, 2): 3})",
            "python:mine:A",
            {},
            ["A: problem('train', 0): its payload cannot be written as JSON: keys must be str", "what JSON can hold"],
        ),
    ],
)
def test_what_is_refused_is_one_line(
    source: str,
    task: str,
    settings: dict[str, Any],
    fragments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (tmp_path / "mine.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        create(task, settings)
    assert "\n" not in str(caught.value)
    assert [fragment for fragment in fragments if fragment not in str(caught.value)] == []
