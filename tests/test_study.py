"""Whole studies of small trials: what they leave, and that failing, stopping and joining change nothing."""

from __future__ import annotations

import csv
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import optuna
import pytest
from mlflow.entities import Run
from optuna.trial import TrialState

from grpo_mlflow.config import Resolved, resolve
from grpo_mlflow.search import space_file
from grpo_mlflow.search.confirm import Finalist
from grpo_mlflow.search.optimize import optimize
from grpo_mlflow.search.storage import open_storage
from grpo_mlflow.search.study import final_trials, slots
from tests.conftest import SMALL

ROOT = Path(__file__).parent.parent
STUDY = ("search.pruner=none", "search.finalists=2", "search.confirm_num_ids=8", "search.confirm_replicates=4")


def study_config(store: str, tmp_path: Path, *overrides: str) -> Resolved:
    storage = f"search.storage=sqlite:///{tmp_path}/optuna.db"
    return resolve("tiny", [*SMALL, *STUDY, f"tracking.uri={store}", storage, *overrides])


def search(resolved: Resolved) -> list[Finalist]:
    found = space_file.load(resolved.config.search.space, resolved)
    return optimize(resolved, found, open_storage(resolved.config.search.storage))


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(resolved: Resolved) -> optuna.Study:
    storage = open_storage(resolved.config.search.storage)
    return optuna.load_study(study_name=resolved.config.search.study_name, storage=storage)


def all_runs(store: str, kind: str) -> list[Run]:
    client = mlflow.MlflowClient(store)
    experiment = client.get_experiment_by_name("grpo").experiment_id
    found: list[Run] = client.search_runs([experiment], f"tags.`grpo.kind` = '{kind}'", order_by=["start_time"])
    return found


def test_a_grid_leaves_a_run_per_combination_under_one_parent(store: str, tmp_path: Path) -> None:
    grid = "train.lr=[1e-3,2e-3] train.kl_coef=[0.01,0.02]"
    resolved = study_config(store, tmp_path, "search.sampler=grid", f"search.space={grid}")
    finalists = search(resolved)
    (parent,) = all_runs(store, "optimize")
    children = all_runs(store, "train")
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert {run.info.status for run in [parent, *children]} == {"FINISHED"}
    found = {(run.data.params["train.lr"], run.data.params["train.kl_coef"]) for run in children}
    assert found == {(lr, kl) for lr in ("0.001", "0.002") for kl in ("0.01", "0.02")}
    assert all("train/loss_total" in run.data.metrics for run in children)
    folder = Path(parent.info.artifact_uri) / "study"
    rows = list(csv.DictReader(io.StringIO((folder / "trials.csv").read_text())))
    assert [row["state"] for row in rows] == ["COMPLETE"] * 4
    assert {row["run_id"] for row in rows} == {run.info.run_id for run in children}
    assert "data:image/png;base64," in (folder / "report.html").read_text()
    confirmed = [finalist.confirmed.value for finalist in finalists]
    assert len(confirmed) == 2
    assert confirmed == sorted(confirmed, reverse=True)
    assert parent.data.metrics["study/confirmed_pass_at_1"] == confirmed[0]
    best = resolve(str(folder / "best_config.yaml")).config
    assert (best.train.lr, best.train.kl_coef) == (
        finalists[0].trial.params["train.lr"],
        finalists[0].trial.params["train.kl_coef"],
    )
    assert best.eval == resolved.config.eval
    assert len(finalists[0].rates) == 8


def test_the_same_command_continues_and_equal_settings_are_not_paid_for_twice(store: str, tmp_path: Path) -> None:
    choice = "search.space=train.lr=[1e-3]"
    search(study_config(store, tmp_path, choice, "search.n_trials=1"))
    resolved = study_config(store, tmp_path, choice, "search.n_trials=3")
    search(resolved)
    trials = final_trials(load(resolved))
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 3
    assert len({trial.value for trial in trials}) == 1
    assert [trial.user_attrs.get("duplicate_of") for trial in trials[1:]] == [0, 0]
    assert len(all_runs(store, "train")) == 1
    assert len(all_runs(store, "optimize")) == 1


def test_a_failing_trial_ends_neither_the_study_nor_counts_as_a_score(store: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    names = f"search.space=model.train_id=[tiny,{broken}]"
    resolved = study_config(store, tmp_path, "search.sampler=grid", names)
    finalists = search(resolved)
    states = {trial.params["model.train_id"]: trial.state for trial in final_trials(load(resolved))}
    assert states == {"tiny": TrialState.COMPLETE, str(broken): TrialState.FAIL}
    assert [finalist.trial.params["model.train_id"] for finalist in finalists] == ["tiny"]
    assert sorted(run.info.status for run in all_runs(store, "train")) == ["FAILED", "FINISHED"]
    assert all_runs(store, "optimize")[0].info.status == "FINISHED"


def _command(store: str, tmp_path: Path, *overrides: str) -> subprocess.Popen[str]:
    storage = f"search.storage=sqlite:///{tmp_path}/optuna.db"
    words = [*SMALL, *STUDY, f"tracking.uri={store}", storage, *overrides]
    return subprocess.Popen(
        [sys.executable, "-m", "entrypoints.optimize", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_ctrl_c_stops_cleanly_and_the_trial_goes_on_in_its_run(store: str, tmp_path: Path) -> None:
    words = ["search.space=train.lr=[1e-3,2e-3]", "search.sampler=grid", "train.iterations=30"]
    process = _command(store, tmp_path, *words)
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if "trial 1  iteration    4" in line:
            process.send_signal(signal.SIGINT)
            break
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130, seen + rest
    assert "Traceback" not in seen + rest
    assert [run.info.status for run in all_runs(store, "train")] == ["FINISHED", "KILLED"]
    assert all_runs(store, "optimize")[0].info.status == "KILLED"
    again = _command(store, tmp_path, *words)
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output
    assert [run.info.status for run in all_runs(store, "train")] == ["FINISHED", "FINISHED"]
    client = mlflow.MlflowClient(store)
    curve = client.get_metric_history(all_runs(store, "train")[1].info.run_id, "eval/pass_at_1")
    assert [point.step for point in curve] == list(range(0, 31, 2))
    resolved = study_config(store, tmp_path, *words)
    assert [len(trials) for trials in slots(load(resolved)).values()] == [1, 2]


@pytest.mark.slow
def test_two_commands_at_once_share_one_study(store: str, tmp_path: Path) -> None:
    words = ["search.space=train.lr='{low: 1e-4, high: 1e-2, log: true}'", "search.n_trials=6", "train.iterations=10"]
    first = _command(store, tmp_path, *words)
    time.sleep(0.2)
    second = _command(store, tmp_path, *words)
    outputs = [process.communicate(timeout=180)[0] for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    trials = final_trials(load(study_config(store, tmp_path, *words)))
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 6
    assert len({trial.params["train.lr"] for trial in trials}) == 6
    children, parents = all_runs(store, "train"), all_runs(store, "optimize")
    assert len(parents) == 1
    assert len(children) == 6
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parents[0].info.run_id}
    assert sum("joining study" in output for output in outputs) == 1
