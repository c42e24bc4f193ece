"""A prompt that is too long and is met late: what the run says to do works."""

from __future__ import annotations

import shlex
from pathlib import Path

import mlflow
import pytest

from grpo_mlflow import runs
from grpo_mlflow.cli import train
from grpo_mlflow.config import TinyConfig, parse_arguments, resolve
from grpo_mlflow.errors import PromptTooLong
from grpo_mlflow.model import tiny
from grpo_mlflow.runs import preflight, stored
from grpo_mlflow.training import rollouts
from tests.support import broken
from tests.support.small_runs import newest

LATE = rollouts.seeds_of_iteration(0, 80, 8, 9, seed=0)[3]  # after the 64 problems that are met before the run
POSITIONS, NEW = 60, 12


def settings(folder: Path, store: str, times: int) -> list[str]:
    words = ["data.task=python:tests.support.posing:Repeated", "seed=0", "eval.enabled=false", "train.iterations=10"]
    words += [f"data.settings={{long: [{LATE}], times: {times}}}", "checkpoint.save_interval=50", "train.kl_coef=0.1"]
    words += ["data.train_seed_start=0", "data.num_train_seeds=80", "data.problems_per_iteration=8"]
    words += [
        "data.rollouts_per_problem=2",
        "train.batch_size=16",
        "train.grad_accum_steps=1",
        "train.lr_warmup_steps=0",
    ]
    return [
        *words,
        f"model.train_id={folder}",
        "model.device=cpu",
        f"tracking.uri={store}",
        f"generation.max_new_tokens={NEW}",
    ]


def commands(text: str) -> list[list[str]]:
    return [shlex.split(line)[2:] for line in text.splitlines() if line.startswith("  grpo train ")]


@pytest.mark.parametrize(("times", "ways"), [(5, ["max_new_tokens", "seeds"]), (8, ["seeds"])])
def test_a_run_goes_on_without_a_prompt_that_is_too_long(
    tmp_path: Path,
    store: str,
    times: int,
    ways: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preflight, "_LOOKED", 0.0)  # as where problems take long to make
    folder = tmp_path / "a model"
    tiny.build(TinyConfig(hidden_size=16, layers=1, heads=2, seed=3)).save(folder)
    broken.edited("config.json", max_position_embeddings=POSITIONS)(folder)
    with pytest.raises(PromptTooLong, match=f"repeated/train/{LATE} has"):
        runs.train(resolve("tiny", settings(folder, store, times)))
    told = capsys.readouterr().out
    failed = newest(store)
    assert "resume=" + failed not in told
    words = [f"resume={failed}", f"tracking.uri={store}"]
    with pytest.raises(PromptTooLong):  # so a resumed run would stop again
        runs.train(*stored.resolve_training(parse_arguments(words, "train", ""), failed))
    again = commands(capsys.readouterr().out)
    assert [any("resume=null" in word for word in command) for command in again] == [True] * len(ways)
    found = commands(told)
    assert [next(way for way in ways if way in command[-2]) for command in found] == ways
    for command in [*found, *again]:
        train.main(command)
        client = mlflow.MlflowClient(store)
        run = client.get_run(newest(store))
        assert run.info.run_id != failed
        assert run.info.status == "FINISHED"
        assert run.data.params["model.ref_id"] == str(folder)
