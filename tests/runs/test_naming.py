"""What runs are called."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_mlflow.config import resolve
from grpo_mlflow.runs import naming


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (3e-4, "3e-4"),
        (1.25e-5, "1.25e-5"),
        (0.05, "0.05"),
        (1.0, "1"),
        (-2e-3, "-2e-3"),
        (0.0, "0"),
        (123456.0, "1.235e5"),
        (float("inf"), "inf"),
        (16, "16"),
        (True, "True"),
        (None, "None"),
        ([1, 4], "[1, 4]"),
        ("a text that is longer than a name", "a text that is lo..."),
    ],
)
def test_values_are_short(value: object, shown: str) -> None:
    assert naming.value(value) == shown


@pytest.mark.parametrize(
    ("kind", "words", "name"),
    [
        ("train", [], "arithmetic tiny lr=4e-4"),
        ("train", ["train.lr=3e-4"], "arithmetic tiny lr=3e-4"),
        ("train", ["train.lr=3e-4", "seed=7", "eval.interval=3", "model.device=cpu"], "arithmetic tiny lr=3e-4 seed=7"),
        ("train", ["model.train_id=org/Model-0.5B", "data.task=sat"], "sat Model-0.5B lr=1e-5"),
        ("train", ["data.task=reasoning_gym/chain_sum"], "chain_sum tiny lr=4e-4"),
        ("train", ["data.task=python:mine.tasks:Sums"], "Sums tiny lr=4e-4"),
        ("evaluate", ["train.lr=3e-4"], "evaluate arithmetic tiny"),
        ("warmup", [], "warmup arithmetic tiny"),
        ("optimize", ["search.study_name=first"], "first"),
    ],
)
def test_a_run_is_called_by_what_it_is(kind: str, words: list[str], name: str) -> None:
    assert naming.of_run(resolve("", words), kind) == name


def test_rows_and_folders_have_their_last_part(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "my sums.jsonl"
    path.write_text('{"question": "1+1", "answer": "2"}\n' * 9)
    resolved = resolve("rows", [f"data.rows.path={path}", f"model.train_id={folder}/", "train.lr=1e-5"])
    assert naming.of_run(resolved, "train") == "my sums model lr=1e-5"


def test_a_name_stays_short() -> None:
    words = ["train.epochs=2", "train.kl_coef=0.1", "train.grad_clip=0.5", "seed=3", "train.batch_size=2"]
    given = naming.of_run(resolve("", words), "train")
    assert given == "arithmetic tiny lr=4e-4 seed=3 batch_size=2 epochs=2 and 2 more"


def test_trials_and_evaluations() -> None:
    assert naming.of_trial(3, {"train.lr": 6e-5, "train.method": "dapo"}) == "trial 3 lr=6e-5 method=dapo"
    assert naming.of_trial(0, {}) == "trial 0"
    assert naming.of_evaluation("arithmetic tiny lr=3e-4", "iter_020") == "eval of arithmetic tiny lr=3e-4@iter_020"
    assert naming.of_evaluation("Qwen2.5-0.5B") == "eval of Qwen2.5-0.5B"
