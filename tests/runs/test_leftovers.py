"""What a process that was killed leaves behind: the next one ends or removes it."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import mlflow
import optuna
import pytest

from grpo_mlflow import runs, tracking
from grpo_mlflow.config import Resolved, parse_arguments, resolve
from grpo_mlflow.errors import UserError
from grpo_mlflow.runs import stored
from grpo_mlflow.runs.session import session
from grpo_mlflow.runtime.files import cache_root, scratch
from grpo_mlflow.search import recovery
from grpo_mlflow.search.study import RUN_ID
from grpo_mlflow.tracking import run_folder
from tests.support.signals import at_every_line
from tests.support.small_runs import resume, same, small

MOMENTS = 16


def _killed_at(store: str, moment: int, lines: multiprocessing.Queue[int]) -> None:
    """Open a run and be killed at that line; without one, tell how many there are."""
    resolved, seen = resolve("tiny", [f"tracking.uri={store}"]), 0

    def reached() -> None:
        nonlocal seen
        seen += 1
        if seen == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    with at_every_line(reached), session(resolved, "train"):
        pass
    lines.put(seen)


def _in_a_process(store: str, moment: int) -> int:
    context = multiprocessing.get_context("fork")
    lines: multiprocessing.Queue[int] = context.Queue()
    process = context.Process(target=_killed_at, args=(store, moment, lines))
    process.start()
    if moment:
        process.join()
        assert process.exitcode == -signal.SIGKILL
        return 0
    counted = lines.get(timeout=60)
    process.join()
    return counted


def test_a_run_that_is_killed_while_it_is_opened_can_be_ended(tmp_path: Path, shared_store: str) -> None:
    client = mlflow.MlflowClient(shared_store)
    client.search_experiments()  # what is imported on the first use does not count
    path = Path(shared_store.removeprefix("sqlite:///"))
    folders = [tmp_path / str(number) for number in range(MOMENTS + 1)]
    for folder in folders:
        folder.mkdir()
        shutil.copyfile(path, folder / "mlflow.db")
    stores = [f"sqlite:///{folder}/mlflow.db" for folder in folders]
    lines, opened = _in_a_process(stores[0], 0), 0
    for number, store in enumerate(stores[1:]):
        _in_a_process(store, 1 + (lines - 1) * number // (MOMENTS + 2))  # how often the end waits differs
        client = mlflow.MlflowClient(store)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        for run in client.search_runs(experiments):
            opened += 1
            part = run_folder(run) / "config" / ".resolved.yaml.0.part"
            part.parent.mkdir(parents=True, exist_ok=True)
            part.touch()
            words = [f"resume={run.info.run_id}", f"tracking.uri={store}"]
            try:
                stored.resolve_training(parse_arguments(words, "train", ""), run.info.run_id)
            except UserError as error:
                assert str(error).endswith("and is marked FAILED now; allowed: a new run")  # noqa: PT017
                assert client.get_run(run.info.run_id).info.status == "FAILED"
                assert not part.exists()
    assert opened >= 3


def test_a_run_that_cannot_be_reopened_keeps_its_status(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve("tiny", [f"tracking.uri={store}"]).config.tracking
    first = tracking.start(config, "train")
    first.finish("KILLED")
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)  # of a `mlflow run` whose run was deleted
    with pytest.raises(UserError, match="0" * 32):
        tracking.start(config, "train", resume=first.run_id)
    assert mlflow.MlflowClient(store).get_run(first.run_id).info.status == "KILLED"


def test_what_a_killed_process_left_in_a_run_is_removed_on_resume(store: str) -> None:
    whole = runs.train(small(store))
    short = runs.train(small(store))
    folder = short.run_dir / "checkpoints"
    shutil.copytree(folder / "iter_002", folder / ".writing-iter_007")
    (folder / "iter_004" / "manifest.json").unlink()
    shutil.copytree(folder / "iter_004", folder / "iter_009")
    (folder / "iter_foo").mkdir()  # not of ours
    (short.run_dir / "config" / ".resolved.yaml.0123abcd.part").write_text("seed")
    (short.run_dir / "samples" / "notes.part").write_text("not of ours")
    same(whole, resume(store, short.run_id), store)
    left = {path.name for path in folder.iterdir()}
    assert left == {path.name for path in (whole.run_dir / "checkpoints").iterdir()} | {"iter_foo"}
    assert [path.name for path in short.run_dir.rglob("*.part")] == ["notes.part"]


def test_scratch_folders_of_dead_processes_are_removed_and_those_in_use_stay(tmp_path: Path) -> None:
    dead, used, young = (tmp_path / f".making-{name}" for name in ("dead", "used", "young"))
    for path in (dead, used, young):
        path.mkdir()
        (path / "model.safetensors").write_text("half")
    for path in (dead, used):
        os.utime(path, (time.time() - 3600,) * 2)
    number = os.open(used, os.O_RDONLY)
    fcntl.flock(number, fcntl.LOCK_EX)
    with scratch(".making-", tmp_path) as made:
        os.utime(made, (time.time() - 3600,) * 2)
        with scratch(".making-", tmp_path) as other:
            assert set(tmp_path.iterdir()) == {used, young, made, other}
        made.rename(tmp_path / "done")
    os.close(number)
    assert {path.name for path in tmp_path.iterdir()} == {used.name, young.name, "done"}


def test_a_model_that_was_half_made_is_removed_by_who_makes_the_next(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / "tiny" / ".making-abc"
    left.mkdir(parents=True)
    os.utime(left, (0, 0))
    monkeypatch.setenv("GRPO_MLFLOW_CACHE", str(tmp_path))
    runs.warmup(small(f"sqlite:///{tmp_path}/mlflow.db", "model.tiny.steps=1"))
    assert [path.name for path in cache_root().glob("tiny/.making-*")] == []
    assert small_model.exists()


def _trial_of(run_id: str) -> optuna.Trial:
    trial = optuna.create_study().ask()
    trial.set_user_attr(RUN_ID, run_id)
    return trial


def _run(resolved: Resolved) -> runs.Finished:
    return runs.train(resolved)


def test_a_trial_whose_checkpoints_are_all_damaged_starts_again_in_a_new_run(shared_store: str) -> None:
    said: list[str] = []
    damaged = _run(small(shared_store, "train.iterations=1", "train.lr_warmup_steps=0"))
    trial = _trial_of(damaged.run_id)
    found = recovery.run_of(trial, shared_store, "", said.append)
    assert (found.run_id if found else None, said) == (damaged.run_id, [])
    for path in damaged.run_dir.glob("checkpoints/iter_*/manifest.json"):
        path.write_text("{}")
    assert recovery.run_of(trial, shared_store, "", said.append) is None
    assert said == [
        f"trial 0: no checkpoint of its run {damaged.run_id} is whole; it starts again, in a new run",
    ]


def test_a_trial_that_died_before_its_config_was_written_goes_on_in_its_run(shared_store: str) -> None:
    opened = tracking.start(resolve("tiny", [f"tracking.uri={shared_store}"]).config.tracking, "train")
    found = recovery.run_of(_trial_of(opened.run_id), shared_store, "", pytest.fail)
    assert found == stored.Stored(opened.run_id, {}, None)
