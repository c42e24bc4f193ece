"""A judge that raises, or gives what is no verdict: one line with a file, and nothing is lost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import numpy as np
import pytest
import torch

from grpo_mlflow import runs, tasks
from grpo_mlflow.config import parse_arguments, resolve
from grpo_mlflow.errors import UserError
from grpo_mlflow.runs import stored
from grpo_mlflow.tasks import Task
from grpo_mlflow.tasks.judged import Judged
from grpo_mlflow.training.rollouts import seeds_of_iteration
from grpo_mlflow.types import Problem, Split, Verdict
from tests.support.paths import DOCS
from tests.support.small_runs import SMALL, curves, newest, weights

GOOD = Verdict(1.0, {"correct": 1.0}, True, "1")


class Scripted(Task):
    """Gives what it was made with as its verdict, or raises it."""

    name = "scripted"

    def __init__(self, gives: Any) -> None:
        self._gives = gives

    def problem(self, split: Split, seed: int) -> Problem:
        return Problem(f"scripted/{split}/{seed}", seed, ({"role": "user", "content": "1"},))

    def verify(self, problem: Problem, text: str) -> Verdict:
        if isinstance(self._gives, BaseException):
            raise self._gives
        verdict: Verdict = self._gives
        return verdict

    def reference_answer(self, problem: Problem) -> str:
        return "1"


class Looks(NamedTuple):
    """What looks like a verdict, but is none."""

    reward: float
    parts: Mapping[str, float]
    success: bool
    parsed: str | None


WRONG: list[tuple[Any, str]] = [
    (KeyError("lost"), "raised KeyError: 'lost'"),
    (MemoryError(), "raised MemoryError: "),
    (RecursionError("too deep\nhere"), "raised RecursionError: too deep here"),
    (SystemExit(3), "raised SystemExit: 3"),
    (None, "gave None; allowed: a Verdict"),
    ("yes", "gave 'yes'; allowed: a Verdict"),
    (1.0, "gave 1.0; allowed: a Verdict"),
    (Looks(1.0, {}, True, "1"), "gave Looks(reward=1.0, parts={}, success=True, parsed='1'); allowed: a Verdict"),
    (Verdict(math.nan, {}, True, "1"), "gave reward = nan; allowed: a finite number"),
    (Verdict(-math.inf, {}, True, "1"), "gave reward = -inf; allowed: a finite number"),
    (Verdict("1", {}, True, "1"), "gave reward = '1'; allowed: a finite number"),  # type: ignore[arg-type]
    (Verdict(None, {}, True, "1"), "gave reward = None; allowed: a finite number"),  # type: ignore[arg-type]
    (Verdict(1.0, [1.0], True, "1"), "gave parts = [1.0]; allowed: numbers by name"),  # type: ignore[arg-type]
    (Verdict(1.0, {"a": None}, True, "1"), "gave the part 'a' = None"),  # type: ignore[dict-item]
    (Verdict(1.0, {3: 1.0}, True, "1"), "gave the part 3 = 1.0"),  # type: ignore[dict-item]
    (Verdict(1.0, {}, "yes", "1"), "gave success = 'yes'; allowed: True, False"),  # type: ignore[arg-type]
    (Verdict(1.0, {}, 1, "1"), "gave success = 1; allowed: True, False"),  # type: ignore[arg-type]
    (Verdict(1.0, {}, True, 1), "gave parsed = 1; allowed: a text, or None"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("gives", "told"), WRONG, ids=lambda value: repr(value)[:40])
def test_what_is_no_verdict_is_one_line_with_the_text_in_a_file(gives: Any, told: str, tmp_path: Path) -> None:
    task = Judged(Scripted(gives), "python:mine:Scripted", tmp_path)
    text = "an answer\r\n\0 \N{SNOWMAN} \ud800"
    with pytest.raises(UserError) as caught:
        task.verify(task.problem("train", 7), text)
    line, path = str(caught.value), tmp_path / "unjudged" / "scripted_train_7-7.txt"
    assert line.startswith("data.task = 'python:mine:Scripted': verify of problem 'scripted/train/7' (seed 7) " + told)
    assert line.endswith(f"; the text is in {path}")
    assert "\n" not in line
    assert path.read_bytes().decode() == text.replace("\ud800", "\\ud800")
    assert caught.value.exit_code == 1


def test_where_the_text_cannot_be_kept_the_line_says_so(tmp_path: Path) -> None:
    (tmp_path / "unjudged").write_text("a file")
    task = Judged(Scripted(None), "mine", tmp_path)
    with pytest.raises(UserError, match="gave None; allowed: a Verdict; the text could not be kept: "):
        task.verify(task.problem("train", 7), "1")


def test_a_verdict_comes_through_as_it_is_and_numbers_of_numpy_as_those_of_python(tmp_path: Path) -> None:
    problem = Scripted(GOOD).problem("train", 0)
    assert Judged(Scripted(GOOD), "mine", tmp_path).verify(problem, "1") is GOOD
    given: Any = Verdict(np.float32(1.0), {"correct": np.int64(1)}, np.bool_(True), "1")  # type: ignore[arg-type]
    found = Judged(Scripted(given), "mine", tmp_path).verify(problem, "1")
    assert found == GOOD
    assert (type(found.reward), type(found.parts["correct"]), type(found.success)) == (float, float, bool)


FLAKY = """
import os
from reverse import Reverse
class Flaky(Reverse):
    def verify(self, problem, text):
        if problem.id == os.environ.get("FLAKY"):
            return None
        return super().verify(problem, text)
"""


@pytest.fixture
def words(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The settings of a small run whose judge fails on the problem that FLAKY names in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(DOCS))
    (tmp_path / "flaky.py").write_text(FLAKY)
    task = ["data.task=python:flaky:Flaky", "data.settings={length: 2}"]
    return [*SMALL, *task, "checkpoint.save_interval=0", "train.iterations=3", f"tracking.uri={store}"]


def test_a_run_that_cannot_judge_a_text_is_saved_and_ends_like_an_undisturbed_one_after_a_resume(
    words: list[str], store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved = resolve("tiny", words)
    undisturbed, data = runs.train(resolved), resolved.config.data
    seed = seeds_of_iteration(data.train_seed_start, data.num_train_seeds, data.problems_per_iteration, 1, 0)[0]
    problem = tasks.of(resolved.config).problem("train", seed)
    monkeypatch.setenv("FLAKY", problem.id)
    with pytest.raises(UserError, match=rf"verify of problem '{problem.id}' \(seed {seed}\) gave None; .*/unjudged/"):
        runs.train(resolved)
    failed = newest(store)
    assert mlflow.MlflowClient(store).get_run(failed).info.status == "FAILED"
    monkeypatch.delenv("FLAKY")
    again = parse_arguments([f"resume={failed}", f"tracking.uri={store}"], "train", "")
    resumed, run = stored.resolve_training(again, failed)
    assert run.checkpoint is not None
    assert run.checkpoint.iteration == 1
    ended = runs.train(resumed, run)
    one, two = weights(undisturbed, 3), weights(ended, 3)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert curves(store, undisturbed.run_id) == curves(store, ended.run_id)


def test_an_evaluation_that_cannot_judge_a_text_is_one_line(
    words: list[str], store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved = resolve("tiny", words)
    problem = tasks.of(resolved.config).problem("eval", resolved.config.eval.id_seed_start)
    monkeypatch.setenv("FLAKY", problem.id)
    with pytest.raises(
        UserError, match=rf"verify of problem '{problem.id}' .* gave None; allowed: a Verdict; the text"
    ):
        runs.evaluate(resolved, "")
    assert mlflow.MlflowClient(store).get_run(newest(store)).info.status == "FAILED"
