"""Only one process works on a run, wherever the others are started; one that has ended holds nothing."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest

from grpo_mlflow import runs, tracking
from grpo_mlflow.config.schema import TrackingConfig
from grpo_mlflow.errors import UserError
from grpo_mlflow.runtime import owners
from tests.support.paths import ROOT
from tests.support.small_runs import SMALL, newest, resume, same, small, until

FORK = multiprocessing.get_context("fork")
OWNER = "grpo.owner"


def _take(store: str, run_id: str, gate: Barrier, told: multiprocessing.Queue[str]) -> None:
    gate.wait(60)
    try:
        tracking.start(TrackingConfig(uri=store), "train", resume=run_id)
        told.put("taken")
    except UserError as error:
        told.put(str(error))
    gate.wait(60)  # who has it lives until the last has asked


def _elsewhere(seen: float) -> str:
    return json.dumps({"machine": "elsewhere pid:[1]", "pid": 7, "started": 0.0, "seen": seen})


def _tags(store: str, run_id: str) -> dict[str, Any]:
    return dict(mlflow.MlflowClient(store).get_run(run_id).data.tags)


@pytest.mark.parametrize("number", range(3))
def test_of_several_that_take_a_run_at_once_one_has_it(number: int, shared_store: str) -> None:
    first = tracking.start(TrackingConfig(uri=shared_store), "train")
    first.finish("KILLED")
    told: multiprocessing.Queue[str] = FORK.Queue()
    gate = FORK.Barrier(3)
    processes = [FORK.Process(target=_take, args=(shared_store, first.run_id, gate, told)) for _ in range(3)]
    for process in processes:
        process.start()
    lines = sorted(told.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    taken = [line for line in lines if line == "taken"]
    assert len(taken) == 1
    numbers = {f"process {process.pid} on {socket.gethostname()}" for process in processes}
    for line in set(lines) - {"taken"}:
        assert line.startswith(f"run {first.run_id}: ")
        assert any(f": {number} works on it; allowed: " in line for number in numbers)
        assert "\n" not in line
    assert [key for key in _tags(shared_store, first.run_id) if key.startswith("grpo.claim")] == []
    again = tracking.start(TrackingConfig(uri=shared_store), "train", resume=first.run_id)  # they are dead now
    again.finish("KILLED")


def test_a_second_resume_is_refused_and_changes_nothing(store: str, tmp_path: Path) -> None:
    whole = runs.train(small(store))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "grpo_mlflow", "train", *SMALL, f"tracking.uri={store}"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    until(process, "iter    2")
    process.send_signal(signal.SIGSTOP)
    running = newest(store)
    holder = f"run {running}: process {process.pid} on {socket.gethostname()} works on it; allowed: "
    with pytest.raises(UserError, match=holder) as caught:
        resume(store, running)
    assert "\n" not in str(caught.value)
    assert mlflow.MlflowClient(store).get_run(running).info.status == "RUNNING"
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=60)
    assert process.returncode == 0
    same(whole, resume(store, running), store)  # which has nothing left to do


def test_a_run_that_has_ended_is_free_though_its_process_lives(store: str) -> None:
    first = tracking.start(TrackingConfig(uri=store), "train")
    assert OWNER in _tags(store, first.run_id)
    first.finish("FINISHED")
    assert OWNER not in _tags(store, first.run_id)


def test_a_run_that_its_process_has_not_yet_described_is_not_marked_as_failed(shared_store: str) -> None:
    opened = tracking.start(TrackingConfig(uri=shared_store), "train")
    alive = {**owners.me(), "pid": os.getppid()}
    alive["started"] = psutil.Process(os.getppid()).create_time()
    mlflow.MlflowClient(shared_store).set_tag(opened.run_id, OWNER, json.dumps(alive))
    with pytest.raises(UserError, match=f"process {os.getppid()} on .* works on it"):
        resume(shared_store, opened.run_id)
    assert mlflow.MlflowClient(shared_store).get_run(opened.run_id).info.status == "RUNNING"


def test_a_process_of_another_machine_is_waited_for_until_it_is_given_up(shared_store: str) -> None:
    client = mlflow.MlflowClient(shared_store)
    first = tracking.start(TrackingConfig(uri=shared_store), "train")
    client.set_tag(first.run_id, OWNER, _elsewhere(time.time() - owners._DEAD + 3))
    began = time.monotonic()
    tracking.require_free(shared_store, first.run_id)
    assert 2 < time.monotonic() - began < 30
    client.set_tag(first.run_id, OWNER, _elsewhere(time.time() - 5))
    beat = threading.Timer(2.0, client.set_tag, (first.run_id, OWNER, _elsewhere(time.time())))
    beat.start()
    with pytest.raises(UserError, match="process 7 on elsewhere works on it"):
        tracking.require_free(shared_store, first.run_id)
    beat.join()


def test_a_run_shows_life_and_one_that_was_taken_over_is_not_written_to(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owners, "_BEAT", 0.1)
    client = mlflow.MlflowClient(store)
    tracker = tracking.start(TrackingConfig(uri=store), "train")
    signed = _tags(store, tracker.run_id)[OWNER]
    until_changed = time.monotonic() + 30
    while _tags(store, tracker.run_id)[OWNER] == signed:
        assert time.monotonic() < until_changed
        time.sleep(0.05)
    client.set_tag(tracker.run_id, OWNER, _elsewhere(time.time()))
    with pytest.raises(UserError, match="another process has it; this one gave no sign of life for too long"):
        while time.monotonic() < until_changed:
            tracker.tags({"a": "b"})
    client.set_tag(tracker.run_id, "a", "c")
    tracker.finish("FAILED")
    run = client.get_run(tracker.run_id)
    assert (run.info.status, run.data.tags["a"]) == ("RUNNING", "c")
    assert json.loads(run.data.tags[OWNER])["machine"].startswith("elsewhere")


@pytest.mark.parametrize("value", ["", "nobody", "[1]", '{"machine": "a"}'])
def test_a_tag_that_names_no_process_holds_nothing(value: str, shared_store: str) -> None:
    first = tracking.start(TrackingConfig(uri=shared_store), "train")
    mlflow.MlflowClient(shared_store).set_tag(first.run_id, OWNER, value)
    tracking.require_free(shared_store, first.run_id)
    tracking.start(TrackingConfig(uri=shared_store), "train", resume=first.run_id)
