"""The data sets of a run as MLflow is to show them: every task has one per split, told from others by its digest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grpo_mlflow import tasks
from grpo_mlflow.config import Config, resolve
from grpo_mlflow.tasks import contents, data_sets
from grpo_mlflow.tasks.data_sets import DataSet

WORDS = ("data.task=arithmetic", "data.arithmetic.digits=2", "eval.num_ids=64", "data.num_train_seeds=128")
OTHER = "7" * 32


def config(*words: str) -> Config:
    return resolve("tiny", [*WORDS, *words]).config


def used(*words: str, kind: str = "train") -> dict[str, DataSet]:
    found = data_sets.used(config(*words), kind)
    assert len({each.context for each in found}) == len(found)
    return {each.context: each for each in found}


def test_a_task_that_makes_its_problems_says_which_and_how_many() -> None:
    found = used()
    train, held_out = found["training"], found["evaluation"]
    assert (train.name, held_out.name) == ("arithmetic train", "arithmetic eval")
    assert (train.profile["num_rows"], train.profile["seed_start"]) == (128, config().data.train_seed_start)
    problems, _ = contents.evaluation_problems(tasks.of(config()), config())
    assert held_out.profile["num_rows"] == len(problems) <= held_out.profile["num_seeds"] == 64
    assert train.source == held_out.source == {"task": "arithmetic", "operations": ("+",), "digits": 2, "terms": 2}
    assert train.profile["settings"] == 'operations=["+"] digits=2 terms=2'
    for each in found.values():
        assert each.source_type == "generated"
        assert len(each.digest) <= 36  # MLflow takes no longer one
        json.dumps([each.source, each.profile])


@pytest.mark.parametrize(
    ("change", "contexts"),
    [
        ("data.arithmetic.digits=3", {"training", "evaluation"}),
        ("data.system_prompt=Think.", {"training", "evaluation"}),
        ("data.train_seed_start=5", {"training"}),
        ("data.num_train_seeds=64", {"training"}),
        ("eval.id_seed_start=9000", {"evaluation"}),
        ("eval.num_ids=8", {"evaluation"}),
        ("train.lr=1e-6", set()),
        ("seed=3", set()),
    ],
)
def test_a_digest_is_that_of_the_problems(change: str, contexts: set[str]) -> None:
    before, after = used(), used(change)
    assert {context for context in before if before[context].digest != after[context].digest} == contexts


def test_other_seeds_of_the_same_problems_are_the_same_data_set() -> None:
    """Every sum of two digits is among 2000 seeds, in whatever order; each counts once."""
    words = ("data.arithmetic.digits=1", "eval.num_ids=2000")
    one, other = (used(*words, f"eval.id_seed_start={n}")["evaluation"] for n in (0, 10**6))
    assert one.digest == other.digest
    assert one.profile["num_rows"] == other.profile["num_rows"] < 60


def test_a_run_names_only_what_it_uses() -> None:
    assert used(kind="evaluate").keys() == {"evaluation"}
    assert used("eval.enabled=false").keys() == {"training"}
    assert used("eval.enabled=false", kind="evaluate").keys() == {"evaluation"}


def test_a_replay_trains_on_the_rollouts_of_a_run() -> None:
    found = used(f"data.source=runs:/{OTHER}")
    assert found["evaluation"] == used()["evaluation"]
    train = found["training"]
    assert (train.name, train.digest, train.source["run_id"]) == ("rollouts of 77777777", OTHER, OTHER)
    settings = config()
    assert train.profile["num_rows"] == settings.train.iterations * settings.rollouts_per_iteration


@pytest.mark.parametrize("task", ["sat", "reasoning_gym/chain_sum"])
def test_every_task_has_data_sets(task: str) -> None:
    if task.startswith("reasoning_gym"):
        pytest.importorskip("reasoning_gym")
    found = used(f"data.task={task}")
    assert [each.name for each in found.values()] == [f"{task} train", f"{task} eval"]


def test_files_and_the_hub_are_named_as_mlflow_names_them(tmp_path: Path) -> None:
    rows = "".join(f'{{"question": "What is {n} + 7?", "answer": "{n + 7}"}}\n' for n in range(50))
    (tmp_path / "mine.jsonl").write_text(rows)
    place = [f"data.rows.path={tmp_path}/mine.jsonl", "data.rows.prompt=question"]
    found = used("data.task=rows", *place, "data.num_train_seeds=16", "eval.num_ids=4")
    for each in found.values():
        assert (each.name, each.source_type) == ("mine.jsonl", "local")
        assert each.source == {"uri": f"{tmp_path}/mine.jsonl"}
    assert sum(each.profile["num_rows"] for each in found.values()) == 50
    assert data_sets.place("openai/gsm8k:main") == ("hugging_face", {"path": "openai/gsm8k", "config_name": "main"})
    assert data_sets.place("org/name") == ("hugging_face", {"path": "org/name"})


def test_a_mix_is_one_data_set_beside_the_rows_of_its_members(tmp_path: Path) -> None:
    mix = ["data.task=mix", "data.mix={sat: 1, arithmetic: 3}"]
    found = used(*mix)
    assert [each.name for each in found.values()] == ["arithmetic + sat train", "arithmetic + sat eval"]
    assert found["training"].source["mix"] == {"sat": 1.0, "arithmetic": 3.0}
    assert used(mix[0], "data.mix={sat: 2, arithmetic: 3}")["training"].digest != found["training"].digest
