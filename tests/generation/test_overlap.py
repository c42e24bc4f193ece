"""Sampling ahead: iteration i + 1 is drawn by the version before, its rollouts say so, and a resume repeats it all."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from grpo_mlflow import runs
from grpo_mlflow.config import Resolved, parse_arguments, resolve
from grpo_mlflow.errors import ConfigError
from grpo_mlflow.runs import stored
from grpo_mlflow.runtime import interrupts
from grpo_mlflow.training import rollout_files
from tests.support.fake_server import DIALECTS, Answer, FakeServer, Fault
from tests.support.small_runs import SMALL


def overlapping(server: FakeServer, store: str, *overrides: str) -> Resolved:
    words = [f"generation.backend={server.dialect}_server", f"generation.base_url={server.url}"]
    words += [f"tracking.uri={store}", "generation.async_rollouts=1", "checkpoint.keep_last=9", "eval.num_ids=4"]
    return resolve("tiny", [*SMALL, *words, *overrides])


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in sorted((run_dir / "metrics").glob("train_iter_*.json"))]
    kept = ("reward_mean", "loss_total", "grad_norm", "sampler_ratio_mean", "sampler_correction_mean")
    return [{key: each[key] for key in kept if key in each} for each in found]


def versions(run_dir: Path) -> list[set[int]]:
    found = [rollout_files.read(path) for path in sorted((run_dir / "rollouts").glob("iter_*.jsonl"))]
    return [{r.completion.policy_version for group in groups for r in group.rollouts} for groups in found]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_each_iteration_is_sampled_by_the_version_before(dialect: str, small_model: Path, shared_store: str) -> None:
    with FakeServer(dialect, small_model) as server:
        ahead = runs.train(overlapping(server, shared_store))
    with FakeServer(dialect, small_model) as server:
        plain = runs.train(overlapping(server, shared_store, "generation.async_rollouts=0"))
    assert versions(plain.run_dir) == [{0}, {1}, {2}, {3}]
    assert versions(ahead.run_dir) == [{0}, {0}, {1}, {2}]
    assert numbers(ahead.run_dir)[0] == numbers(plain.run_dir)[0]
    on_policy = [abs(each["sampler_ratio_mean"] - 1) for each in numbers(plain.run_dir)]
    off_policy = [abs(each["sampler_ratio_mean"] - 1) for each in numbers(ahead.run_dir)]
    assert max(on_policy) < 1e-4
    assert min(off_policy[1:]) > 10 * max(on_policy)  # the correction has something to correct


def test_a_resumed_run_trains_on_what_was_sampled_ahead(small_model: Path, shared_store: str) -> None:
    with FakeServer("vllm", small_model) as server:
        whole = runs.train(overlapping(server, shared_store))
        name = str(whole.run_dir / "checkpoints" / "iter_002")
        arguments = parse_arguments([f"resume={name}", f"tracking.uri={shared_store}"], "train", "")
        again = runs.train(*stored.resolve_training(arguments, str(arguments.resumes())))
    assert again.run_id == whole.run_id
    assert numbers(again.run_dir) == numbers(whole.run_dir)
    assert versions(again.run_dir) == [{0}, {0}, {1}, {2}]


def test_a_signal_does_not_wait_for_what_is_sampled_ahead(small_model: Path, shared_store: str) -> None:
    over = threading.Event()

    def interrupt(server: FakeServer, answer: Answer) -> Answer:
        os.kill(os.getpid(), signal.SIGTERM)
        over.wait(60)
        return answer

    with FakeServer("vllm", small_model, [Fault("/v1/completions", interrupt, loads=2, nth=5)]) as server:
        began = time.monotonic()
        with pytest.raises(interrupts.Interrupted):
            runs.train(overlapping(server, shared_store, "eval.enabled=false"))
        assert time.monotonic() - began < 50
        over.set()
    folder = Path(shared_store.removeprefix("sqlite:///")).parent
    assert list(folder.rglob("checkpoints/iter_001/manifest.json"))


def test_in_process_sampling_cannot_run_ahead() -> None:
    with pytest.raises(ConfigError, match="samples with the weights that are being trained"):
        resolve("tiny", ["generation.async_rollouts=1"])
