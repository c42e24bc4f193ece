"""Several processes train like one, and end like one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from accelerate import Accelerator

from grpo_mlflow import runs
from grpo_mlflow.errors import Pruned, UserError
from grpo_mlflow.model.devices import choose_device
from grpo_mlflow.runtime import interrupts
from grpo_mlflow.runtime.processes import Processes
from grpo_mlflow.tracking.places import ANSWER, COMMAND
from tests.support import ranks
from tests.support.groups import ALL_TERMS, K, fresh, make_groups
from tests.support.paths import ROOT
from tests.support.small_runs import SMALL, curves, equal, newest, resume, small, until

AGGREGATIONS = ("grpo", "dapo", "dr_grpo", "bnpo")
CONSTANT = "train.lr_schedule=constant"
LONG = ("train.iterations=2000", "eval.interval=1000", CONSTANT)


@pytest.fixture
def store(shared_store: str) -> str:
    return shared_store


@pytest.fixture(autouse=True)
def _model(small_model: Path) -> None:
    """Make the model once, not in every process."""


def words(store: str, *overrides: str) -> tuple[str, ...]:
    return (*SMALL, f"tracking.uri={store}", *overrides)


def test_two_processes_train_like_one(store: str, tmp_path: Path) -> None:
    """Several optimizer steps per iteration, an adaptive KL coefficient, and evaluations and rounds of resampling that
    do not divide evenly."""
    settings = ("eval.num_ids=9", "train.batch_size=4", "train.grad_accum_steps=2", "data.resample_rounds=3", "seed=1")
    one = runs.train(small(store, *settings))
    started = ranks.start(ranks.train, words(store, *settings), tmp_path / "two")
    assert started.end() == [0, 0], started.everything()
    assert started.text(1) == ""
    equal(store, one.run_id, newest(store))


def test_two_processes_measure_a_model_like_one(store: str, tmp_path: Path) -> None:
    whole = runs.evaluate(small(store, "eval.num_ids=9"), "")
    started = ranks.start(ranks.evaluate, words(store, "eval.num_ids=9"), tmp_path)
    assert started.end() == [0, 0], started.everything()
    found = mlflow.MlflowClient(store).get_run(newest(store)).data.metrics
    expected = {f"eval/{name.replace('@', '_at_')}": value for name, value in whole.metrics().items()}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert whole.summary() in started.text(0)
    assert started.text(1) == ""


def _gradients(path: str) -> None:
    """Save the gradient of one optimizer step for each aggregation, of ragged micro-batches with flat groups."""
    from grpo_mlflow.config import TrainConfig
    from grpo_mlflow.training.learner import Learner, Sizes

    found = {}
    for aggregation in AGGREGATIONS:
        groups = make_groups(5, flat=(1,))
        settings: dict[str, Any] = {"batch_size": 3, "grad_accum_steps": "auto", "grad_clip": None}
        settings |= {"aggregation": aggregation, **ALL_TERMS}
        config = TrainConfig(**settings)
        made = Learner(fresh(), fresh(seed=4), Accelerator(cpu=True), config, Sizes(0.8, 16, 5 * K, 100))
        metrics = made.update(groups, 0, 0)
        moments = [entry["exp_avg"].flatten() for entry in made.optimizer.state_dict()["state"].values()]
        found[aggregation] = (torch.cat(moments), metrics)
    torch.save(found, f"{path}-{os.environ.get('RANK', 'alone')}")


def test_one_optimizer_step_has_the_gradient_of_one_process(tmp_path: Path) -> None:
    path = str(tmp_path / "gradients")
    _gradients(path)
    started = ranks.start(_gradients, (path,), tmp_path)
    assert started.end() == [0, 0], started.everything()
    whole = torch.load(f"{path}-alone")
    for rank in range(2):
        shared = torch.load(f"{path}-{rank}")
        for aggregation in AGGREGATIONS:
            (one, metrics), (two, others) = whole[aggregation], shared[aggregation]
            assert (one - two).norm() < 1e-5 * one.norm(), aggregation
            assert others == pytest.approx(metrics, rel=1e-4, abs=1e-6)


def test_a_run_goes_on_with_another_number_of_processes(store: str, tmp_path: Path) -> None:
    whole = runs.train(small(store, CONSTANT))
    started = ranks.start(ranks.train, words(store, CONSTANT, "train.iterations=2"), tmp_path)
    assert started.end() == [0, 0], started.everything()
    two_first = newest(store)
    resume(store, two_first, "train.iterations=4")
    equal(store, whole.run_id, two_first)
    one_first = runs.train(small(store, CONSTANT, "train.iterations=2")).run_id
    more = (f"resume={one_first}", f"tracking.uri={store}", "train.iterations=4")
    started = ranks.start(ranks.train, more, tmp_path)
    assert started.end() == [0, 0], started.everything()
    equal(store, whole.run_id, one_first)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_stops_all_after_the_same_iteration(store: str, tmp_path: Path, rank: int) -> None:
    started = ranks.start(ranks.train, words(store, *LONG), tmp_path)
    started.wait_for("iter    2")
    os.kill(started.processes[rank].pid or 0, signal.SIGTERM)
    assert started.end() == [143, 143], started.everything()
    run = newest(store)
    client = mlflow.MlflowClient(store)
    assert client.get_run(run).info.status == "KILLED"
    assert started.everything().count(f"resume={run}") == 1
    assert "Traceback" not in started.everything()
    reached = int(client.get_run(run).data.tags["grpo.last_checkpoint"].removeprefix("iter_"))
    assert reached == len(curves(store, run)["train/loss_total"]) >= 3
    resume(store, run, f"train.iterations={reached + 1}")
    assert client.get_run(run).info.status == "FINISHED"


@pytest.mark.parametrize("rank", [0, 1])
def test_when_one_process_is_killed_the_other_ends_and_the_run_can_go_on(store: str, tmp_path: Path, rank: int) -> None:
    started = ranks.start(ranks.train, words(store, *LONG), tmp_path)
    started.wait_for("iter    2")
    started.processes[rank].kill()
    began = time.monotonic()
    codes = started.end()
    assert time.monotonic() - began < 30
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] == 1, started.everything()
    assert len(started.errors()) == 1
    assert "gone" in started.errors()[0] or "no sign of life" in started.errors()[0]
    assert "Traceback" not in started.everything()
    run = newest(store)
    client = mlflow.MlflowClient(store)
    assert (client.get_run(run).info.status, client.get_run(run).data.tags["grpo.ended"]) == ("FAILED", "FAILED")
    assert f"resume={run}" in started.text(1 - rank)
    reached = int(client.get_run(run).data.tags["grpo.last_checkpoint"].removeprefix("iter_"))
    resume(store, run, f"train.iterations={reached + 1}")
    assert client.get_run(run).info.status == "FINISHED"


def test_a_command_is_obeyed_by_all_processes(store: str, tmp_path: Path) -> None:
    started = ranks.start(ranks.train, words(store, *LONG, "checkpoint.save_interval=0"), tmp_path)
    client = mlflow.MlflowClient(store)
    for command, sign in (("save", "asked by MLflow: save: saved iter_"), ("stop", "asked by MLflow: stop: ended")):
        started.wait_for("iter    2")
        client.set_tag(newest(store), COMMAND, command)
        started.wait_for(sign)
    assert started.end() == [130, 130], started.everything()
    run = client.get_run(newest(store))
    assert run.data.tags["grpo.ended"] == "KILLED"
    assert run.data.tags[ANSWER].startswith("stop: ended at iteration ")
    saved = sorted(path.name for path in Path(run.info.artifact_uri, "checkpoints").iterdir())
    assert saved[-1] == run.data.tags["grpo.last_checkpoint"]
    assert len(saved) == 2  # as asked, and at the end


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "how"), [(TORCHRUN, signal.SIGINT), (ACCELERATE, signal.SIGTERM)], ids=["torchrun", "accelerate"]
)
def test_a_signal_to_the_launcher_stops_the_run_as_one(
    store: str, tmp_path: Path, launcher: Sequence[str], how: signal.Signals
) -> None:
    command = [sys.executable, "-m", *launcher, "-m", "grpo_mlflow", "train", *words(store, *LONG, "model.device=cpu")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, env=environment, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    until(process, "iter    2")
    process.send_signal(how)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    run = newest(store)
    tags = mlflow.MlflowClient(store).get_run(run).data.tags
    assert tags["grpo.ended"] == "KILLED"
    assert rest.count(f"resume={run}") == 1
    reached = int(tags["grpo.last_checkpoint"].removeprefix("iter_"))
    assert reached == len(curves(store, run)["train/loss_total"])


@pytest.mark.slow
def test_a_process_that_stands_still_ends_the_run_within_a_minute(store: str, tmp_path: Path) -> None:
    started = ranks.start(ranks.train, words(store, *LONG), tmp_path)
    started.wait_for("iter    2")
    os.kill(started.processes[1].pid or 0, signal.SIGSTOP)
    started.processes[0].join(60)
    assert started.processes[0].exitcode == 1, started.everything()
    assert started.errors() == [
        "error: process 1 gave no sign of life for 20 s; process 0 of 2 hangs and is ended",
    ]
    run = newest(store)
    assert mlflow.MlflowClient(store).get_run(run).info.status == "FAILED"
    os.kill(started.processes[1].pid or 0, signal.SIGCONT)
    assert started.end()[1] not in (0, None)


def _ends(how: str) -> None:
    """Two phases that end differently in the two processes; print how each met it."""
    processes = Processes(Accelerator(cpu=True))

    def fails() -> None:
        if not processes.is_first:
            raise UserError("no space left")
        time.sleep(60)

    def prunes() -> None:
        raise Pruned("hopeless")

    try:
        with interrupts.handled(), processes.watched(on_hang=lambda: None):
            assert processes.agreed(lambda: processes.rank) == processes.rank
            assert processes.together(processes.own("abcde")) == list("abcde")
            assert processes.broadcast(processes.rank) == 0
            assert processes.one_after_first(lambda: processes.rank) == processes.rank
            if how == "fails":
                processes.agreed(fails)
            if how == "prunes":
                processes.decided(prunes)
    except (UserError, Pruned) as error:
        print(f"{type(error).__name__}: {error} {getattr(error, 'told', '')}")


def test_an_error_in_one_process_ends_the_phase_of_all(tmp_path: Path) -> None:
    started = ranks.start(_ends, ("fails",), tmp_path)
    began = time.monotonic()
    assert started.end() == [0, 0], started.everything()
    assert time.monotonic() - began < 30  # the first slept for a minute
    assert started.text(0) == "PeerLost: process 1 of 2 failed: no space left False\n"
    assert started.text(1) == "UserError: no space left True\n"


def test_a_decision_to_prune_is_that_of_all(tmp_path: Path) -> None:
    started = ranks.start(_ends, ("prunes",), tmp_path)
    assert started.end() == [0, 0], started.everything()
    assert [started.text(rank) for rank in range(2)] == ["Pruned: hopeless \n"] * 2


def test_an_end_without_trouble_leaves_nobody_waiting(tmp_path: Path) -> None:
    started = ranks.start(_ends, ("well",), tmp_path, count=3)
    assert started.end(20) == [0, 0, 0], started.everything()
    assert started.everything().count("\n") == 5


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "data.problems_per_iteration=3",
            "data.problems_per_iteration = 3: does not divide over 2 processes; allowed: multiples of 2",
        ),
        ("data.problems_per_iteration=0", "data.problems_per_iteration = 0 (override): input should be greater"),
    ],
)
def test_what_several_processes_cannot_do_is_one_line(store: str, tmp_path: Path, override: str, line: str) -> None:
    more = ("train.grad_accum_steps=auto", "generation.base_url=http://127.0.0.1:9")
    started = ranks.start(ranks.train, words(store, *more, *override.split()), tmp_path)
    assert started.end() == [2, 2]
    assert len(started.errors()) == 1
    assert started.errors()[0].startswith(f"error: {line}")


def test_an_environment_that_is_half_a_launchers_is_refused(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="LOCAL_RANK"):
        runs.train(small(store))


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_a_model_in_pieces_is_refused(store: str, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(UserError, match="plain data parallel"):
        runs.train(small(store))


def test_each_process_of_a_machine_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    assert choose_device("auto") == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # a scheduler that shows each process one
    assert choose_device("auto") == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="2 CUDA devices"):
        choose_device("auto")
