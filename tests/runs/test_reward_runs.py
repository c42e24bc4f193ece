"""Runs whose rows are judged by functions and a judge: stopped, resumed, replayed, shared, served, mixed, searched."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest

from grpo_mlflow import runs, tasks
from grpo_mlflow.config import Resolved, resolve
from grpo_mlflow.errors import ServerFailed, UserError
from grpo_mlflow.training import rollout_files
from tests.support import ranks
from tests.support.fake_judge import FakeJudge, by_length
from tests.support.fake_server import SAMPLE, FakeServer
from tests.support.small_runs import SMALL, curves, newest, resume, same
from tests.support.small_studies import STUDY, search

FUNCTIONS = """
import os, pathlib
def near(completions, answer, **kwargs):
    kwargs["log_metric"]("batch", len(completions))
    mark = pathlib.Path(__file__).with_name("fails")
    if mark.exists() and kwargs["trainer_state"].global_step == int(mark.read_text()):
        raise KeyError("lost")
    return [1.0 / (1 + abs(len(text) - len(wanted))) for text, wanted in zip(completions, answer)]
async def low(completions, level, **kwargs):
    return [None if hard else text.count("1") / 4 for text, hard in zip(completions, level)]
"""


@pytest.fixture
def words(shared_store: str, small_model: Path, tmp_path: Path) -> list[str]:
    """The settings of a small run on 16 rows, and 4 to evaluate on, judged by two functions of a file."""
    asked = [{"prompt": f"What is {n}+{n % 4}?", "answer": str(n + n % 4), "level": n % 3} for n in range(20)]
    for name, rows in (("train", asked[4:]), ("test", asked[:4])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    given = ["data.task=rows", f"data.rows.path={tmp_path}", f"data.rewards={json.dumps(functions(tmp_path))}"]
    sizes = ["data.num_train_seeds=16", "eval.num_ids=4", "generation.max_new_tokens=4", "train.iterations=3"]
    rest = ["eval.interval=1", "generation.batch_size=2", f"model.train_id={small_model}", "data.reward_timeout=30"]
    return [*SMALL, f"tracking.uri={shared_store}", *given, *sizes, *rest]


def functions(folder: Path, **more: Any) -> dict[str, Any]:
    own = {name: {"use": f"python:{folder}/mine.py:{name}", "weight": w} for name, w in (("near", 1), ("low", 0.5))}
    return {**own, **more}


def judged(folder: Path, fake: FakeJudge, **options: Any) -> str:
    judge = {
        "use": "judge",
        "base_url": fake.url,
        "model": "grader",
        "rubric": "Q: {question}\nA: {completion}",
        "cache": str(folder / "cache"),
        **options,
    }
    return f"data.rewards={json.dumps(functions(folder, grade=judge))}"


def resolved(words: list[str], *more: str) -> Resolved:
    return tasks.fitted(resolve("tiny", [*words, *more]))


def metric(store: str, run_id: str, key: str) -> list[float]:
    return [point.value for point in mlflow.MlflowClient(store).get_metric_history(run_id, key)]


def test_a_function_that_fails_stops_a_run_that_ends_like_an_undisturbed_one(
    words: list[str], shared_store: str, tmp_path: Path
) -> None:
    whole = runs.train(resolved(words))
    assert metric(shared_store, whole.run_id, "train/logged_batch") == [8.0] * 3  # 2 prompts at a time
    assert metric(shared_store, whole.run_id, "train/reward_low_applies") != [1.0] * 3
    (tmp_path / "fails").write_text("2")
    with pytest.raises(UserError, match=r"data\.rewards\.near: function near \(.*mine\.py, line 7\) raised KeyError"):
        runs.train(resolved(words))
    failed = newest(shared_store)
    assert mlflow.MlflowClient(shared_store).get_run(failed).info.status == "FAILED"
    (tmp_path / "fails").unlink()
    same(whole, resume(shared_store, failed), shared_store, 3)


def test_what_a_judge_has_said_is_not_asked_again_by_a_resumed_or_replayed_run(
    words: list[str], shared_store: str, tmp_path: Path
) -> None:
    with FakeJudge() as fake:
        _same_functions(tmp_path, "one")
        words += ["generation.batch_size=4"]  # all of an iteration in one batch, which is judged before the run ends
        whole = runs.train(resolved(words, judged(tmp_path / "one", fake)))
        asked = fake.asked
        questions = {json.dumps(body["messages"]) for body in fake.bodies}
        assert asked == len(questions)  # equal completions are one question
        assert sum(metric(shared_store, whole.run_id, "perf/judge_requests")) == asked
        assert sum(metric(shared_store, whole.run_id, "perf/judge_prompt_tokens")) == 100 * asked

        fake.bodies.clear()
        _same_functions(tmp_path, "two")
        (tmp_path / "two" / "fails").write_text("2")
        with pytest.raises(UserError, match="KeyError"):
            runs.train(resolved(words, judged(tmp_path / "two", fake)))
        (tmp_path / "two" / "fails").unlink()
        resumed = resume(shared_store, newest(shared_store))
        assert fake.asked == asked
        same(whole, resumed, shared_store, 3)

        replayed = runs.train(resolved(words, judged(tmp_path / "one", fake), f"data.source=runs:/{whole.run_id}"))
        assert fake.asked == asked
        kept = [rollout_files.read(run.run_dir / "rollouts" / "iter_001.jsonl") for run in (whole, replayed)]
        assert kept[0] == kept[1]
        assert (
            curves(shared_store, whole.run_id)["eval/pass_at_1"]
            == curves(shared_store, replayed.run_id)["eval/pass_at_1"]
        )


def _same_functions(folder: Path, name: str) -> None:
    """Copy the functions into a folder of their own."""
    (folder / name).mkdir()
    (folder / name / "mine.py").write_text(FUNCTIONS)


def test_a_judge_that_is_away_for_a_while_costs_no_iteration(
    words: list[str], shared_store: str, tmp_path: Path
) -> None:
    first = FakeJudge(refuse=lambda number, body: (503, "going away") if number > 20 else None)
    with first:
        given = judged(tmp_path, first, retry_seconds=60)
        second = FakeJudge(port=first.port)
        done: list[float] = []

        def replace() -> None:
            while first.asked <= 20:
                time.sleep(0.02)
            first.__exit__()
            time.sleep(1.5)
            second.__enter__()
            done.append(1)

        threading.Thread(target=replace, daemon=True).start()
        finished = runs.train(resolved(words, given))
    second.__exit__()
    assert done
    assert finished.progress.iteration == 3
    assert sum(metric(shared_store, finished.run_id, "perf/judge_retries")) > 0


def test_a_judge_that_stays_away_stops_the_run_and_makes_no_reward_up(
    words: list[str], shared_store: str, tmp_path: Path
) -> None:
    with FakeJudge() as fake:
        whole = runs.train(resolved(words, judged(tmp_path, fake, cache=str(tmp_path / "a"))))
        limit = fake.asked - 3
    away = FakeJudge(refuse=lambda number, body: (503, "away") if number > limit else None, port=fake.port)
    options = {"retry_seconds": 0.3, "cache": str(tmp_path / "b")}
    with away, pytest.raises(ServerFailed, match=r"data\.rewards\.grade: http://.*/v1: the judge failed for 0\.3 s"):
        runs.train(resolved(words, judged(tmp_path, fake, **options)))
    failed = newest(shared_store)
    with FakeJudge(port=fake.port):
        same(whole, resume(shared_store, failed), shared_store, 3)


def test_weights_of_rewards_vary_in_a_study_and_evaluations_stay_the_same(
    words: list[str], shared_store: str, tmp_path: Path
) -> None:
    own = [f"search.storage=sqlite:///{tmp_path}/optuna.db", "search.space=train.reward_weights.near=[0.0,4.0]"]
    quick = ["train.iterations=1", "train.lr_warmup_steps=0", "search.n_trials=2", "search.sampler=grid"]
    search(resolved(words, *STUDY, *own, *quick))
    client = mlflow.MlflowClient(shared_store)
    experiment = client.get_experiment_by_name("grpo").experiment_id
    trials = [run for run in client.search_runs([experiment]) if "train/reward_near" in run.data.metrics]
    parts = sorted(run.data.metrics["train/reward_near"] for run in trials[:2])
    assert parts[0] == 0.0
    assert parts[1] > 0


def test_two_processes_share_the_judging(words: list[str], shared_store: str, tmp_path: Path) -> None:
    with FakeJudge() as fake:
        one = runs.train(resolved(words, judged(tmp_path, fake)))
        asked = fake.asked
        started = ranks.start(
            ranks.train, [*words, judged(tmp_path, fake, cache=str(tmp_path / "two"))], tmp_path / "p"
        )
        assert started.end() == [0, 0], started.everything()
        assert fake.asked <= 2 * asked + 4  # equal texts of two processes may be asked for at once
    run = newest(shared_store)
    first, second = curves(shared_store, one.run_id), curves(shared_store, run)
    assert first.keys() == second.keys()
    for key, points in first.items():
        if "logged" not in key:  # batches are smaller
            assert [v for _, v in second[key]] == pytest.approx([v for _, v in points], rel=1e-4, abs=1e-6), key
    assert sum(metric(shared_store, run, "perf/judge_requests")) == fake.asked - asked


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_server_samples_what_is_judged(words: list[str], small_model: Path, shared_store: str, ahead: int) -> None:
    with FakeServer("vllm", small_model) as server:
        own = ["generation.backend=vllm_server", f"generation.base_url={server.url}"]
        finished = runs.train(resolved(words, *own, f"generation.async_rollouts={ahead}", "data.resample_rounds=1"))
    assert finished.progress.iteration == 3
    assert len(metric(shared_store, finished.run_id, "train/reward_near")) == 3


def test_a_judge_is_asked_while_a_server_samples(words: list[str], small_model: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    def answer(body: dict[str, Any]) -> str:
        seen.append(server.requests[SAMPLE["vllm"]])
        return by_length(body)

    with FakeServer("vllm", small_model) as server, FakeJudge(answer) as fake:
        own = ["generation.backend=vllm_server", f"generation.base_url={server.url}", "generation.batch_size=1"]
        short = ["eval.enabled=false", "train.iterations=1", "train.lr_warmup_steps=0"]
        runs.train(resolved(words, judged(tmp_path, fake), *own, *short))
        assert seen[0] < server.requests[SAMPLE["vllm"]]


def test_rows_with_rewards_are_part_of_a_mix(words: list[str], shared_store: str) -> None:
    finished = runs.train(
        resolved(words, "data.task=mix", "data.mix={rows: 1, arithmetic: 1}", "data.num_train_seeds=64")
    )
    found = mlflow.MlflowClient(shared_store).get_run(finished.run_id).data.metrics
    assert 0 < found["train/reward_near_applies"] < 1
    assert found["train/rows/reward_near_applies"] == 1
    assert "train/arithmetic/reward_near" not in found
