"""Runs on rows of the user's own, with all that a run can be: resumed, replayed, shared, served, mixed, searched."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import mlflow
import pytest

from grpo_mlflow import runs, tasks
from grpo_mlflow.config import Resolved, resolve
from grpo_mlflow.errors import UserError
from grpo_mlflow.training import rollout_files
from tests.support import ranks
from tests.support.fake_server import FakeServer
from tests.support.small_runs import SMALL, curves, newest, resume, same
from tests.support.small_studies import STUDY, search

LINE = "rows: 26 distinct (1 duplicate), 17 train, 9 evaluation from "


@pytest.fixture
def words(shared_store: str, small_model: Path, tmp_path: Path) -> list[str]:
    """The settings of a small run on 17 rows, and 9 to evaluate on, of which one stands twice."""
    asked = [{"question": f"What is {n}+{n % 4}?", "answer": str(n + n % 4), "level": n % 3} for n in range(26)]
    for name, rows in (("train", asked[9:]), ("test", [*asked[:9], asked[0]])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [f"data.rows.path={tmp_path}", "data.rows.prompt={question} Only the number."]
    sizes = ["data.num_train_seeds=17", "eval.num_ids=256", "generation.max_new_tokens=4", "train.iterations=2"]
    return [*SMALL, f"tracking.uri={shared_store}", f"model.train_id={small_model}", "data.task=rows", *given, *sizes]


def resolved(words: list[str], *more: str) -> Resolved:
    return tasks.fitted(resolve("tiny", [*words, *more]))


def test_a_run_says_its_rows_and_logs_them_as_data_sets(
    words: list[str], shared_store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished = runs.train(resolved(words))
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("rows: ")] == [LINE + str(tmp_path)]
    assert [line for line in printed.splitlines() if " 9 " in line and "num_ids" in line] == [
        "eval.num_ids = 256: 9 different problems; each counts once"
    ]
    assert "9 problems)" in printed  # of the intervals
    run = mlflow.MlflowClient(shared_store).get_run(finished.run_id)
    assert run.data.metrics["eval/tasks"] == 9
    found = {each.tags[0].value: each.dataset for each in run.inputs.dataset_inputs}
    assert found.keys() == {"training", "evaluation"}
    assert [json.loads(found[key].profile) for key in ("training", "evaluation")] == [{"num_rows": 17}, {"num_rows": 9}]
    assert {json.loads(each.source)["uri"] for each in found.values()} == {str(tmp_path)}
    digests = tasks.Rows(resolved(words).config.data.rows).table.digests
    assert (found["training"].digest, found["evaluation"].digest) == (digests["train"], digests["eval"])


def test_every_row_is_asked_once_before_one_is_asked_again(words: list[str]) -> None:
    finished = runs.train(resolved(words, "train.iterations=8", "eval.enabled=false"))
    groups = [rollout_files.read(finished.run_dir / f"rollouts/iter_{n:03d}.jsonl") for n in range(8)]
    asked = [[group.problem.messages[0]["content"] for group in each] for each in groups]
    first, second = (list(chain(*asked[start : start + 4])) for start in (0, 4))  # of 17 rows, 16 fill 4 iterations
    assert len(set(first)) == len(set(second)) == 16
    assert first != second
    payload = groups[0][0].problem.payload
    assert payload["columns"].keys() == {"question", "answer", "level"}
    assert payload["answer"] == payload["columns"]["answer"]


def test_a_run_on_rows_goes_on_and_is_replayed(words: list[str], shared_store: str) -> None:
    whole = runs.train(resolved(words))
    part = runs.train(resolved(words, "train.iterations=1", "train.lr_warmup_steps=0", "train.lr_schedule=constant"))
    assert resume(shared_store, part.run_id, "train.iterations=2").progress.iteration == 2
    same(whole, runs.train(resolved(words, f"data.source=runs:/{whole.run_id}")), shared_store, 2)


def test_a_run_does_not_go_on_with_other_rows(words: list[str], shared_store: str, tmp_path: Path) -> None:
    run = runs.train(resolved(words, "train.iterations=1", "train.lr_warmup_steps=0"))
    before = (tmp_path / "train.jsonl").read_text()
    (tmp_path / "train.jsonl").write_text(before.replace('"level": 0', '"level": 9').replace('"1', '"9'))
    with pytest.raises(UserError, match=r"its rows have changed since it began; allowed: the rows as they were"):
        resume(shared_store, run.run_id, "train.iterations=2")
    (tmp_path / "train.jsonl").write_text(before)
    assert resume(shared_store, run.run_id, "train.iterations=2").progress.iteration == 2


def test_two_processes_share_rows(words: list[str], shared_store: str, tmp_path: Path) -> None:
    one = runs.train(resolved(words))
    started = ranks.start(ranks.train, words, tmp_path / "two")
    assert started.end() == [0, 0], started.everything()
    assert started.text(0).count(LINE) == 1
    assert started.text(1) == ""
    first, second = curves(shared_store, one.run_id), curves(shared_store, newest(shared_store))
    assert first.keys() == second.keys()
    for key, points in first.items():
        assert [value for _, value in second[key]] == pytest.approx([v for _, v in points], rel=1e-4, abs=1e-6), key


def test_a_server_samples_rows(words: list[str], small_model: Path) -> None:
    with FakeServer("vllm", small_model) as server:
        own = ["generation.backend=vllm_server", f"generation.base_url={server.url}"]
        assert runs.train(resolved(words, *own)).progress.iteration == 2


def test_rows_are_part_of_a_mix(words: list[str], shared_store: str) -> None:
    mix = ["data.task=mix", "data.mix={rows: 1, arithmetic: 1}"]
    finished = runs.train(resolved(words, *mix, "data.num_train_seeds=64", "eval.num_ids=40"))
    run = mlflow.MlflowClient(shared_store).get_run(finished.run_id)
    assert run.data.metrics["eval/rows/tasks"] <= 9 < run.data.metrics["eval/tasks"]
    names = {(each.dataset.name, each.tags[0].value) for each in run.inputs.dataset_inputs}
    assert {("arithmetic + rows train", "training"), ("arithmetic + rows eval", "evaluation")} < names
    assert len(run.inputs.dataset_inputs) == 4  # and the rows of both splits


def test_a_study_over_rows(words: list[str], shared_store: str, tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text("train.lr: {choices: [1.0e-4, 1.0e-3]}\n")
    own = [f"search.storage=sqlite:///{tmp_path}/optuna.db", f"search.space={tmp_path}/space.yaml"]
    winner = search(resolved(words, *STUDY, *own, "search.n_trials=2", "search.sampler=grid"))[0]
    assert winner.confirmed.value >= 0
    client = mlflow.MlflowClient(shared_store)
    experiment = client.get_experiment_by_name("grpo").experiment_id
    [parent] = client.search_runs([experiment], "tags.`grpo.kind` = 'optimize'")
    assert len(parent.inputs.dataset_inputs) == 2
    changed = (tmp_path / "test.jsonl").read_text().replace('"answer": "', '"answer": "0')
    (tmp_path / "test.jsonl").write_text(changed)
    with pytest.raises(UserError, match=r"^study 'grpo': its rows have changed since it began"):
        search(resolved(words, *STUDY, *own, "search.n_trials=2", "search.sampler=grid"))
