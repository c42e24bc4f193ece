"""Whole training runs with a real vLLM that they start themselves: `make test-server`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import stdev

import psutil
import pytest

from grpo_mlflow import runs
from grpo_mlflow.algorithm.statistics import mean, paired_difference, t_quantile, verdict
from grpo_mlflow.config import Resolved, resolve
from tests.support.paths import ROOT
from tests.support.real_vllm import NEEDS_VLLM, PYTHON, kill_server_once

pytestmark = NEEDS_VLLM
SEEDS = range(5)
LEARNER = (
    "train.iterations=10",
    "train.lr_warmup_steps=2",
    "eval.interval=10",
    "checkpoint.save_interval=2",
    f"generation.server.python={PYTHON}",
    "generation.server.device=cpu",
)


@pytest.fixture(scope="module")
def local(shared_store: str) -> list[runs.Finished]:
    """The same run in this process under several seeds: what its outcome owes to the draws."""
    return [runs.train(resolve("tiny", [*LEARNER, f"tracking.uri={shared_store}", f"seed={seed}"])) for seed in SEEDS]


def served(shared_store: str, *overrides: str) -> Resolved:
    words = ["generation.backend=vllm_server", "generation.server.manage=true", f"tracking.uri={shared_store}"]
    return resolve("tiny", [*LEARNER, *words, *overrides])


def test_training_learns_as_in_process_though_the_server_is_killed(
    local: list[runs.Finished], shared_store: str
) -> None:
    """Two things in one run, since a start takes long: the same learning, and a killed server that is replaced.

    A server draws other completions than this process, so its run is one more of those under other seeds: its outcome
    lies in their prediction interval (99%).
    """
    store, in_process = Path(shared_store.removeprefix("sqlite:///")).parent, {run.run_dir for run in local}
    killed = kill_server_once(
        lambda: any(path.parent.parent not in in_process for path in store.rglob("train_iter_003.json"))
    )
    finished = runs.train(served(shared_store))
    assert killed
    perf = [json.loads(path.read_text()) for path in sorted((finished.run_dir / "metrics").glob("train_iter_*.json"))]
    assert len(perf) == 10
    assert sum(each["server_restarts"] for each in perf) >= 1
    outcomes = [mean(run.progress.last_rates) for run in local]
    difference = mean(finished.progress.last_rates) - mean(outcomes)
    allowed = t_quantile(0.995, len(outcomes) - 1) * stdev(outcomes) * (1 + 1 / len(outcomes)) ** 0.5
    print(f"after 10 iterations, server minus in-process: {difference:+.3f} (of {outcomes}; allowed +- {allowed:.3f})")
    assert abs(difference) <= allowed
    gain = paired_difference(finished.progress.last_rates, finished.progress.first_rates)
    assert verdict(gain) == "better"  # it did learn


def test_no_process_outlives_a_killed_trainer(tmp_path: Path, local: list[runs.Finished]) -> None:
    log = tmp_path / "out"
    command = [sys.executable, "-m", "grpo_mlflow", "train", *LEARNER, f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
    command += ["generation.backend=vllm_server", "generation.server.manage=true", "train.iterations=1000"]
    with log.open("w") as stream:
        trainer = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=stream)
    deadline = time.monotonic() + 300
    while "iter    1" not in log.read_text() and time.monotonic() < deadline:
        assert trainer.poll() is None, log.read_text()
        time.sleep(0.5)
    family = psutil.Process(trainer.pid).children(recursive=True)
    assert len(family) >= 3  # warden, server, engine
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    left, deadline = family, time.monotonic() + 30
    while left and time.monotonic() < deadline:
        time.sleep(0.2)
        left = [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert left == []
