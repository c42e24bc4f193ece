"""Whole runs, small enough to repeat many times, and what they left."""

from __future__ import annotations

import subprocess
from pathlib import Path

import mlflow
import pytest
import torch
from safetensors.torch import load_file

from grpo_mlflow import runs
from grpo_mlflow.config import Resolved, parse_arguments, resolve
from grpo_mlflow.runs import stored
from grpo_mlflow.training.rollout_files import read

# A whole run with every feature.
SMALL = (
    "model.tiny.hidden_size=32",
    "model.tiny.layers=1",
    "model.tiny.heads=2",
    "model.tiny.steps=120",
    "model.tiny.lr=3e-3",
    "data.arithmetic.digits=1",
    "data.problems_per_iteration=4",
    "data.rollouts_per_problem=4",
    "train.iterations=4",
    "train.kl_coef=0.02",
    "train.kl_target=0.05",
    "train.batch_size=8",
    "train.grad_accum_steps=1",
    "train.epochs=2",
    "train.lr_schedule=cosine",
    "train.lr_warmup_steps=2",
    "eval.num_ids=8",
    "eval.replicates=4",
    "eval.interval=2",
    "checkpoint.save_interval=1",
)


def small(store: str, *overrides: str) -> Resolved:
    return resolve("tiny", [*SMALL, f"tracking.uri={store}", *overrides])


def resume(store: str, name: str, *overrides: str) -> runs.Finished:
    words = [f"resume={name}", f"tracking.uri={store}", *overrides]
    arguments = parse_arguments(words, "train", "")
    found = arguments.resumes()
    assert found is not None
    return runs.train(*stored.resolve_training(arguments, found))


def curves(store: str, run_id: str) -> dict[str, list[tuple[int, float]]]:
    """Every curve of a run but those that measure time."""
    client = mlflow.MlflowClient(store)
    keys = [key for key in client.get_run(run_id).data.metrics if not key.startswith("perf/")]
    return {key: [(p.step, p.value) for p in client.get_metric_history(run_id, key)] for key in keys}


def weights(finished: runs.Finished, iteration: int) -> dict[str, torch.Tensor]:
    folder = finished.run_dir / "checkpoints" / f"iter_{iteration:03d}"
    optimizer = {f"optimizer.{k}": v for k, v in load_file(folder / "trainer" / "optimizer.safetensors").items()}
    return {**load_file(folder / "model.safetensors"), **optimizer}


def same(one: runs.Finished, two: runs.Finished, store: str, iteration: int = 4) -> None:
    """Assert that two runs are equal bit for bit: weights, optimizer and every curve."""
    first, second = weights(one, iteration), weights(two, iteration)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert curves(store, one.run_id) == curves(store, two.run_id)


def equal(store: str, one: str, two: str) -> None:
    """Assert that two runs sampled the same tokens and have the same curves up to rounding."""
    first, second = curves(store, one), curves(store, two)
    assert first.keys() == second.keys()
    for key in first:
        assert [step for step, _ in first[key]] == [step for step, _ in second[key]], key
        found = [value for _, value in second[key]]
        # between a sampler and a trainer of one model there is rounding alone, of which this is the largest
        least = 1e-4 if key == "train/sampler_logp_difference_max" else 1e-6
        assert found == pytest.approx([value for _, value in first[key]], rel=1e-4, abs=least), (key, found)
    client = mlflow.MlflowClient(store)
    folders = [Path(client.get_run(run).info.artifact_uri) / "rollouts" for run in (one, two)]
    names = sorted(path.name for path in folders[0].iterdir())
    assert names == sorted(path.name for path in folders[1].iterdir())
    for name in names:
        for group, other in zip(*(read(folder / name) for folder in folders), strict=True):
            assert group.problem == other.problem
            tokens = [[r.completion.token_ids for r in g.rollouts] for g in (group, other)]
            assert tokens[0] == tokens[1]


def newest(store: str) -> str:
    client = mlflow.MlflowClient(store)
    experiment = client.get_experiment_by_name("grpo")
    found: str = client.search_runs([experiment.experiment_id])[0].info.run_id
    return found


def until(process: subprocess.Popen[str], text: str) -> str:
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(seen)
