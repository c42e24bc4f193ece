"""Runs whose processes hold a model in shards are those of one process, and end as those of several."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import mlflow
import pytest

from grpo_mlflow import runs
from tests.support import ranks
from tests.support.small_runs import SMALL, curves, equal, newest, resume, small

THREE = "data.problems_per_iteration=6"  # divides over two and over three processes
CONSTANT = "train.lr_schedule=constant"
LONG = ("train.iterations=2000", "eval.interval=1000", CONSTANT)
SHARDED = "train.sharding=full"


@pytest.fixture
def store(shared_store: str) -> str:
    return shared_store


@pytest.fixture(autouse=True)
def _model(small_model: Path) -> None:
    """Make the model once, not in every process."""


def train(folder: Path, count: int, *words: str) -> None:
    started = ranks.start(ranks.train, words, folder, count)
    assert set(started.end(120)) == {0}, started.everything()
    assert all(started.text(rank) == "" for rank in range(1, count))


MODELS = {
    "full": ("data.resample_rounds=2", "eval.num_ids=9", "train.grad_accum_steps=2", "train.batch_size=4"),
    "a whole reference": ("model.ref_device=cpu",),
    "adapter": ("model.lora.rank=12", "model.gradient_checkpointing=true", "train.optimizer=sgd"),
    "adapter on a base in bfloat16": (
        "model.lora.rank=4",
        "model.frozen_dtype=bfloat16",
        "train.optimizer_offload=cpu",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_a_run_goes_on_in_any_number_of_processes_in_shards_or_not(
    store: str, tmp_path: Path, settings: Sequence[str]
) -> None:
    words = (*settings, THREE, CONSTANT, "eval.interval=1")
    whole = runs.train(small(store, *words))
    train(tmp_path, 2, *SMALL, f"tracking.uri={store}", *words, SHARDED, "train.iterations=2")
    run = newest(store)
    train(tmp_path, 3, f"resume={run}", f"tracking.uri={store}", "train.iterations=3")
    resume(store, run, "train.sharding=none", "train.iterations=4")
    equal(store, whole.run_id, run)
    one_first = runs.train(small(store, *words, "train.iterations=2")).run_id
    train(tmp_path, 2, f"resume={one_first}", f"tracking.uri={store}", SHARDED, "train.iterations=4")
    equal(store, whole.run_id, one_first)


def test_a_signal_stops_all_and_their_shards_are_saved_together(store: str, tmp_path: Path) -> None:
    low = ("model.dtype=bfloat16", "model.cast_lm_head_to_fp32=true")
    words = (*SMALL, f"tracking.uri={store}", *LONG, *low, SHARDED, "checkpoint.save_interval=0")
    started = ranks.start(ranks.train, words, tmp_path)
    started.wait_for("iter    2")
    os.kill(started.processes[1].pid or 0, signal.SIGTERM)
    assert started.end() == [143, 143], started.everything()
    run = newest(store)
    reached = int(mlflow.MlflowClient(store).get_run(run).data.tags["grpo.last_checkpoint"].removeprefix("iter_"))
    assert reached == len(curves(store, run)["train/loss_total"]) >= 3
    resume(store, run, f"train.iterations={reached + 1}")


@pytest.mark.parametrize("rank", [0, 1])
def test_when_a_process_is_killed_the_last_checkpoint_counts(store: str, tmp_path: Path, rank: int) -> None:
    started = ranks.start(ranks.train, (*SMALL, f"tracking.uri={store}", *LONG, SHARDED), tmp_path)
    started.wait_for("iter    2")
    started.processes[rank].kill()
    began = time.monotonic()
    codes = started.end()
    assert time.monotonic() - began < 30
    assert codes[1 - rank] == 1, started.everything()
    assert len(started.errors()) == 1
    assert "Traceback" not in started.everything()
    run = newest(store)
    client = mlflow.MlflowClient(store)
    assert client.get_run(run).info.status == "FAILED"
    reached = int(client.get_run(run).data.tags["grpo.last_checkpoint"].removeprefix("iter_"))
    resume(store, run, f"train.iterations={reached + 1}")
    assert client.get_run(run).info.status == "FINISHED"
