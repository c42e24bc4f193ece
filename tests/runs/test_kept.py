"""What a run has kept while MLflow's artifacts were away: sent by a command, and not silently begun again elsewhere."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import mlflow
import optuna
import psutil
import pytest

from grpo_mlflow import runs, tracking
from grpo_mlflow.algorithm.statistics import rate_interval
from grpo_mlflow.cli import upload
from grpo_mlflow.errors import ConfigError, StoreAway, UserError
from grpo_mlflow.runtime import interrupts, owners
from grpo_mlflow.search import champion
from grpo_mlflow.search.confirm import Finalist, Model
from grpo_mlflow.training.checkpoint import name_of
from tests.support.artifacts import Memory, serving
from tests.support.small_runs import curves, resume, small
from tests.support.small_studies import search, study_config

EVERYTHING = ""
SHORT = ("train.iterations=2", "train.lr_schedule=constant", "tracking.experiment=remote")


@pytest.fixture
def home(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with an experiment whose artifacts are on a server in memory."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.chdir(folder)
    Memory.files = {}
    with serving(Memory) as address:
        tracking.connect(store).create_experiment("remote", address)
        yield folder
    Memory.away = None


def _names(run: runs.Finished) -> set[str]:
    return {str(path.relative_to(run.run_dir)) for path in run.run_dir.rglob("*") if path.is_file()}


def _sent(run_id: str) -> set[str]:
    prefix = f"{run_id}/artifacts/"
    return {name.removeprefix(prefix) for name in Memory.files if name.startswith(prefix)}


def test_upload_sends_what_runs_below_a_folder_have_kept(
    home: Path, store: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    Memory.away = EVERYTHING
    run = runs.train(small(store, *SHORT))
    client = mlflow.MlflowClient(store)
    assert client.get_run(run.run_id).info.status == "RUNNING"
    assert "grpo.owner" not in client.get_run(run.run_id).data.tags  # another may go on with it, or send it
    assert f"`grpo upload --folder {run.run_dir} tracking.uri={store}` sends it" in caplog.text
    with pytest.raises(UserError, match="1 runs still wait for MLflow; the same command goes on"):
        upload.main([f"tracking.uri={store}"])
    assert "501 Server Error" in capsys.readouterr().out
    Memory.away = None
    upload.main(["--folder", str(run.run_dir), f"tracking.uri={store}"])
    assert capsys.readouterr().out.endswith(" sent, 0 wait\nnothing waits for MLflow\n")
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert "grpo.owner" not in client.get_run(run.run_id).data.tags
    assert _sent(run.run_id) == _names(run)
    found = curves(store, run.run_id)
    assert [step for step, _ in found["train/loss_total"]] == [0, 1]
    assert [step for step, _ in found["eval/pass_at_1"]] == [0, 2]
    upload.main([f"tracking.uri={store}"])  # nothing is left to do


@pytest.mark.parametrize(
    ("error", "status"),
    [(interrupts.Interrupted(15), "KILLED"), (KeyboardInterrupt(), "KILLED"), (RuntimeError(), "FAILED")],
)
def test_upload_brings_the_status_of_a_run_that_ended_while_its_writes_waited(
    error: BaseException, status: str, home: Path, store: str
) -> None:
    Memory.away = EVERYTHING
    with pytest.raises(type(error)), runs.session(small(store, *SHORT), "train") as (_, tracker, _):
        raise error
    client = mlflow.MlflowClient(store)
    assert client.get_run(tracker.run_id).info.status == "RUNNING"
    Memory.away = None
    upload.main(["--folder", str(tracker.run_dir), f"tracking.uri={store}"])
    assert client.get_run(tracker.run_id).info.status == status
    assert not list(home.rglob("spool.jsonl"))


def test_upload_leaves_alone_what_a_living_process_writes(
    home: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Memory.away = EVERYTHING
    tracker = tracking.start(small(store, *SHORT).config.tracking, "train")
    tracker.text("a.json", "{}")
    tracker.finish("FAILED")
    other = {**owners.me(), "pid": os.getppid(), "started": psutil.Process(os.getppid()).create_time()}
    client = mlflow.MlflowClient(store)
    client.set_tag(tracker.run_id, "grpo.owner", json.dumps(other))
    Memory.away = None
    with pytest.raises(UserError, match="1 runs still wait"):
        upload.main([f"tracking.uri={store}"])
    assert f"3 wait: run {tracker.run_id}: process {os.getppid()} on " in capsys.readouterr().out
    assert Memory.files == {}
    (home / "outputs" / tracker.run_id).rename(home / "outputs" / ("0" * 32))  # of a run of another store
    with pytest.raises(UserError, match="1 runs still wait"):
        upload.main([f"tracking.uri={store}"])
    assert f"run {'0' * 32}: is not in the MLflow store" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="folder = 'nowhere': is no folder"):
        upload.main(["--folder", "nowhere"])


@pytest.mark.parametrize("away", [EVERYTHING, "/checkpoints/"])
def test_a_resume_elsewhere_is_refused_until_all_is_sent(
    away: str, home: Path, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = runs.train(small(store, *SHORT, "train.iterations=4"))
    Memory.away = away
    run = runs.train(small(store, *SHORT))
    Memory.away = None
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    with pytest.raises(UserError, match=f"kept is in {run.run_dir} on {socket.gethostname()}; from here") as caught:
        resume(store, run.run_id, "train.iterations=4")
    assert "\n" not in str(caught.value)
    assert run.run_dir == home / "outputs" / run.run_id
    upload.main(["--folder", str(home), f"tracking.uri={store}"])
    continued = resume(store, run.run_id, "train.iterations=4")
    assert continued.progress.iteration == 4
    assert curves(store, run.run_id) == curves(store, whole.run_id)
    assert mlflow.MlflowClient(store).get_run(run.run_id).data.tags["grpo.folder"] == str(continued.run_dir)


def test_a_run_goes_on_in_the_folder_that_has_its_files_before_they_are_sent(home: Path, store: str) -> None:
    whole = runs.train(small(store, *SHORT, "train.iterations=4", "eval.interval=1"))
    Memory.away = EVERYTHING
    run = runs.train(small(store, *SHORT, "eval.interval=1"))
    continued = resume(store, run.run_id, "train.iterations=3")
    assert (continued.run_dir, continued.progress.iteration) == (run.run_dir, 3)
    Memory.away = None
    resume(store, run.run_id, "train.iterations=4")
    assert curves(store, run.run_id) == curves(store, whole.run_id)


def test_a_checkpoint_whose_upload_was_cut_off_is_sent_by_a_resume_from_it(home: Path, store: str) -> None:
    run = runs.train(small(store, *SHORT, "checkpoint.keep_last=2"))
    for name in ("manifest.json", "model.safetensors"):  # what a kill leaves
        del Memory.files[f"{run.run_id}/artifacts/checkpoints/iter_002/{name}"]
    continued = resume(store, run.run_id, "train.iterations=3")
    assert "checkpoints/iter_002/manifest.json" in _names(continued)
    assert _sent(run.run_id) == _names(continued)


def test_a_run_that_ended_before_its_first_checkpoint_begins_again_anywhere(
    home: Path, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError), runs.session(small(store, *SHORT), "train") as (_, tracker, _):
        raise RuntimeError("before the first iteration")
    monkeypatch.chdir(tmp_path)
    assert resume(store, tracker.run_id).progress.iteration == 2


def test_a_study_names_a_winner_when_all_that_its_trials_have_kept_is_sent(
    home: Path, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*SHORT, "search.space=train.lr=[1e-5,1e-2]", "search.sampler=grid", "search.finalists=1"]
    resolved = study_config(store, tmp_path, *words)
    client = mlflow.MlflowClient(store)
    Memory.away = EVERYTHING
    with pytest.raises(StoreAway, match=r"of its writes still wait for MLflow: 501 Server Error"):
        search(resolved)
    with pytest.raises(mlflow.MlflowException):
        client.get_model_version_by_alias(resolved.config.search.study_name, "champion")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    Memory.away = None
    with pytest.raises(StoreAway, match=rf"files wait in {home}/outputs/[0-9a-f]+ on {socket.gethostname()}; allowed"):
        search(resolved)
    monkeypatch.chdir(home)
    (winner,) = search(resolved)
    version = client.get_model_version_by_alias(resolved.config.search.study_name, "champion")
    assert version.source.endswith(f"{winner.models[0].run_id}/artifacts/checkpoints/{name_of(2)}")
    assert f"checkpoints/{name_of(2)}/manifest.json" in _sent(version.run_id)
    experiment = client.get_experiment_by_name("remote").experiment_id
    trials = client.search_runs([experiment], "tags.`optuna.slot` LIKE '%'")
    assert [run.info.status for run in trials] == ["FINISHED"] * 2
    for run in trials:
        assert [step for step, _ in curves(store, run.info.run_id)["train/loss_total"]] == [0, 1]
    assert list(home.rglob("spool.jsonl")) == []


def test_no_model_becomes_the_champion_before_mlflow_has_it(home: Path, store: str) -> None:
    Memory.away = "/checkpoints/"
    run = runs.train(small(store, *SHORT))
    estimate = rate_interval([0.5, 0.5], 4)
    model = Model(run.run_id, (0.5, 0.5))
    winner = Finalist(optuna.trial.create_trial(value=0.5), estimate, model.rates, 4, models=(model,))
    with runs.session(small(store, *SHORT), "optimize") as (_, tracker, _):
        with pytest.raises(UserError, match=rf"MLflow lacks its checkpoints/iter_002.*{run.run_dir} on ") as caught:
            champion.register(store, "early", winner, "last", tracker)
        assert "\n" not in str(caught.value)
        client = mlflow.MlflowClient(store)
        assert client.search_model_versions("name = 'early'") == []
        Memory.away = None
        upload.main([f"tracking.uri={store}"])
        champion.register(store, "early", winner, "last", tracker)
    assert client.get_model_version_by_alias("early", "champion").run_id == run.run_id
