"""Mixes, the run's own system prompt and the price of length, and what a run logs of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest

from grpo_mlflow import runs, tasks
from grpo_mlflow.config import resolve
from grpo_mlflow.errors import ConfigError
from grpo_mlflow.tasks import Mix, Overlong, Posed, create, member_of
from grpo_mlflow.tasks.settings import task_settings
from grpo_mlflow.training import rollout_files
from grpo_mlflow.training.evaluation import Evaluation, Outcome
from grpo_mlflow.training.rollouts import judge
from grpo_mlflow.types import Completion, Prompt, Rollout, Split, Verdict
from tests.support.small_runs import SMALL

SPLITS: tuple[Split, ...] = ("train", "eval")
ARITHMETIC, SAT = create("arithmetic", {}), create("sat", {})
MIX = Mix({"sat": SAT, "arithmetic": ARITHMETIC}, {"arithmetic": 3.0, "sat": 1.0})


@pytest.mark.parametrize("split", SPLITS)
def test_each_problem_is_its_tasks_own(split: Split) -> None:
    names = []
    for seed in range(400):
        problem = MIX.problem(split, seed)
        name = member_of(problem.id)
        assert name in MIX.tasks
        own = MIX.tasks[name].problem(split, seed)
        assert problem == replace(own, id=f"mix/{name}/{split}/{seed}")
        assert MIX.chance(problem) == MIX.tasks[name].chance(own)
        assert MIX.verify(problem, MIX.reference_answer(problem)).success
        assert not MIX.verify(problem, "").success
        names.append(name)
    assert 0.68 < names.count("arithmetic") / 400 < 0.82


def test_the_order_of_a_mix_changes_nothing() -> None:
    other = Mix({"arithmetic": ARITHMETIC, "sat": SAT}, {"sat": 10.0, "arithmetic": 30.0})
    assert [MIX.problem("train", seed) for seed in range(50)] == [other.problem("train", seed) for seed in range(50)]


def test_members_are_read_off_ids() -> None:
    assert member_of("mix/reasoning_gym/gcd/eval/7") == "reasoning_gym/gcd"
    assert member_of("mix/python:a.b:C/train/0") == "python:a.b:C"
    assert member_of("arithmetic/train/7") is None


def completion(length: int) -> Completion:
    return Completion((1,) * length, "", (0.0,) * length, "stop", 0)


@pytest.mark.parametrize(("length", "penalty"), [(0, 0), (6, 0), (7, -0.25), (8, -0.5), (9, -0.75), (10, -1), (11, -1)])
def test_overlong_is_equation_13_of_dapo(length: int, penalty: float) -> None:
    verdict = Verdict(0.9, {"correct": 0.9}, True, "1")
    found = Overlong(limit=10, buffer=4).penalise(verdict, completion(length))
    assert found == Verdict(0.9 + penalty, {"correct": 0.9, "overlong": penalty}, True, "1")


def test_only_training_pays_for_length() -> None:
    problem = ARITHMETIC.problem("train", 0)
    prompt = Prompt(problem.id, problem.messages, (1,))
    for task, training, parts in (
        (Posed(ARITHMETIC, None, Overlong(8, 8)), True, {"correct", "format", "overlong"}),
        (Posed(ARITHMETIC, None, Overlong(8, 8)), False, {"correct", "format"}),
        (Posed(ARITHMETIC, "Be brief."), True, {"correct", "format"}),
        (ARITHMETIC, True, {"correct", "format"}),
    ):
        [[judged]] = judge(task, [problem], [prompt], [[completion(4)]], training)
        assert set(judged.verdict.parts) == parts
        assert judged.verdict.reward == (-0.5 if "overlong" in parts else 0.0)


def test_a_system_prompt_comes_first_and_once() -> None:
    problem = ARITHMETIC.problem("train", 0)
    once = Posed(ARITHMETIC, "Be brief.")
    twice = Posed(once, "Be exact.")
    assert once.problem("train", 0).messages == ({"role": "system", "content": "Be brief."}, *problem.messages)
    assert twice.problem("train", 0).messages == ({"role": "system", "content": "Be exact."}, *problem.messages)
    assert replace(once.problem("train", 0), messages=problem.messages) == problem


def test_a_plain_task_is_not_wrapped() -> None:
    assert type(tasks.of(resolve("tiny").config)) is tasks.Arithmetic


def test_what_decides_prompts_decides_the_embedded_model() -> None:
    mix = ["data.task=mix", "data.mix={arithmetic: 1, sat: 1}"]
    words: list[list[str]] = [
        [],
        ["data.system_prompt=Hi"],
        mix,
        [*mix, "data.sat.difficulty=[0,0]"],
        [*mix, "data.mix={sat: 1}"],
    ]
    found = [json.dumps(task_settings(resolve("tiny", each).config)) for each in words]
    assert len(set(found)) == len(found)
    longer = resolve("tiny", ["data.overlong_buffer=2"]).config
    assert task_settings(longer) == task_settings(resolve("tiny").config)


def rollout(problem_id: str, success: bool) -> Rollout:
    verdict = Verdict(float(success), {"correct": float(success)}, success, "1")
    return Rollout(Prompt(problem_id, (), (1,)), completion(1), verdict)


def test_an_evaluation_counts_each_task_of_a_mix() -> None:
    rows = (("mix/a/eval/0", True), ("mix/a/eval/1", False), ("mix/b/eval/2", True))
    outcomes = tuple(Outcome(name, (rollout(name, right),) * 2, None, 0.0) for name, right in rows)
    figures = Evaluation(outcomes, (1,)).metrics()
    assert figures["pass@1"] == pytest.approx(2 / 3)
    assert (figures["a/pass@1"], figures["a/tasks"], figures["b/pass@1"], figures["b/tasks"]) == (0.5, 2, 1.0, 1)
    assert figures["b/mean@1_low"] == pytest.approx(0.025)  # of one problem, solved: .025 = 1 - confidence, halved
    plain = Evaluation((Outcome("a/eval/0", (rollout("a/eval/0", True),), None, 0.0),), (1,)).metrics()
    assert not [name for name in plain if "/" in name]


def test_a_run_on_a_mix(store: str, tmp_path: Path) -> None:
    words = [*SMALL, f"tracking.uri={store}", "data.task=mix", "data.mix={arithmetic: 0.6, sat: 0.4}"]
    words += ["data.sat.difficulty=[0,0]", "data.overlong_buffer=6", "data.system_prompt=Answer.", "train.iterations=2"]
    finished = runs.train(resolve("tiny", [*words, "eval.num_ids=12", "model.tiny.steps=20"]))
    logged = mlflow.MlflowClient(store).get_run(finished.run_id).data
    assert logged.params["data.mix"] == "{'arithmetic': 0.6, 'sat': 0.4}"
    for task in ("arithmetic", "sat"):
        assert {f"eval/{task}/pass_at_1", f"eval/{task}/tasks", f"eval/{task}/greedy_accuracy"} <= set(logged.metrics)
        assert {f"train/{task}/success_rate", f"train/{task}/reward_correct"} <= set(logged.metrics)
    assert logged.metrics["eval/arithmetic/tasks"] + logged.metrics["eval/sat/tasks"] == logged.metrics["eval/tasks"]
    assert logged.metrics["eval/tasks"] <= 12  # seeds, some of which name the same problem
    assert logged.metrics["train/reward_overlong"] < 0
    groups = rollout_files.read(finished.run_dir / "rollouts" / "iter_001.jsonl")
    assert all(group.problem.messages[0] == {"role": "system", "content": "Answer."} for group in groups)
    for each in (r for group in groups for r in group.rollouts):
        assert each.verdict.parts["overlong"] == pytest.approx(-max(0, len(each.completion.token_ids) - 2) / 6)
        assert each.verdict.reward == pytest.approx(sum(each.verdict.parts.values()))
    text = (finished.run_dir / "metrics" / "eval_iter_002.json").read_text()
    assert "overlong" not in text


def test_a_task_with_rewards_below_zero_is_not_trained_with_their_mean_as_divisor() -> None:
    words = ["data.task=mix", "data.mix={arithmetic: 1, sat: 1}", "train.scale_rewards=mean"]
    resolved = resolve("tiny", words)
    assert tasks.fitted(resolved, trains=False) == resolved
    with pytest.raises(ConfigError, match=r"data\.task = 'mix' gives rewards down to -0\.2; allowed: "):
        tasks.fitted(resolved)
    assert tasks.fitted(resolve("tiny", ["train.scale_rewards=mean"])).config.train.scale_rewards == "mean"
    with pytest.raises(ConfigError, match=r"data\.overlong_buffer = 2: makes rewards below 0.*allowed: 0"):
        resolve("tiny", ["train.scale_rewards=mean", "data.overlong_buffer=2"])


def test_a_mix_has_the_rewards_of_all_its_tasks() -> None:
    assert MIX.reward_range == SAT.reward_range
    assert SAT.reward_range == pytest.approx((-0.2, 1 + 0.15 * 0.3 * 2 + 0.1 * 0.2 * 2 + 0.05 * 0.1))
