"""The integration tests of a machine with a GPU and an inference server: `make test-gpu`.

    GRPO_TEST_SERVER   the server's address; http://127.0.0.1:30000 where it is not set
    GRPO_TEST_BACKEND  vllm_server (default) or sglang_server
    GRPO_TEST_MODEL    what it serves: a hub id or folder; the embedded model where it is not set
    GRPO_TEST_DEVICE   where training happens: cuda where it is not set; cpu tries the tests without a GPU

They skip where there is no CUDA and no other device was named.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from grpo_mlflow import runs, tasks
from grpo_mlflow.config import Resolved, resolve
from grpo_mlflow.generation import Generators, training_sampling
from grpo_mlflow.model import loading, policy
from grpo_mlflow.model.devices import choose_device
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.training import evaluation, rollouts

DEVICE = os.environ.get("GRPO_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.startswith("cuda") and not torch.cuda.is_available(), reason="no CUDA here"),
]


@pytest.fixture(scope="module")
def resolved(shared_store: str) -> Resolved:
    backend = os.environ.get("GRPO_TEST_BACKEND", "vllm_server")
    words = [
        f"model.train_id={os.environ.get('GRPO_TEST_MODEL', 'tiny')}",
        f"model.device={DEVICE}",
        f"generation.backend={backend}",
        f"generation.base_url={os.environ.get('GRPO_TEST_SERVER', 'http://127.0.0.1:30000')}",
        f"tracking.uri={shared_store}",
        "data.problems_per_iteration=4",
        "data.rollouts_per_problem=4",
        "train.iterations=2",
        "train.lr_warmup_steps=0",
        "train.kl_coef=0.02",
        "eval.num_ids=4",
        "eval.replicates=4",
        "eval.interval=1",
    ]
    return resolve("tiny", words)


@pytest.fixture(scope="module")
def actor(resolved: Resolved) -> Policy:
    config = resolved.config
    source = loading.model_source(config.model.train_id, config)
    return policy.load(source, choose_device(config.model.device), config.model.dtype)


@pytest.fixture(scope="module")
def generators(resolved: Resolved, actor: Policy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Generators]:
    log, name = tmp_path_factory.mktemp("log") / "server.log", resolved.config.model.train_id
    with Generators(resolved.config, actor, name, name, log, print) as found:
        yield found


def test_the_server_samples_rollouts(resolved: Resolved, actor: Policy, generators: Generators) -> None:
    config, task = resolved.config, tasks.of(resolved.config)
    generator = generators.training()
    generator.sync(0)
    problems = [task.problem("train", seed) for seed in range(4)]
    sampling = training_sampling(config.generation)
    groups = rollouts.collect(task, actor, generator, problems, k=4, sampling=sampling, seed=0, key=("gpu",))
    assert [len(group) for group in groups] == [4] * 4
    assert all(r.completion.token_ids and r.completion.text is not None for group in groups for r in group)


def test_the_evaluator_uses_the_server(resolved: Resolved, actor: Policy, generators: Generators) -> None:
    evaluator = generators.evaluation()
    evaluator.sync(0)
    figures = evaluation.evaluate(tasks.of(resolved.config), actor, evaluator, resolved.config).metrics()
    assert 0 <= figures["pass@1"] <= figures["pass@4"] <= 1
    assert figures["tasks"] == 4


@pytest.fixture(scope="module")
def finished(resolved: Resolved) -> runs.Finished:
    return runs.train(resolved)


def test_training_on_the_servers_rollouts(finished: runs.Finished) -> None:
    for path in sorted((finished.run_dir / "metrics").glob("train_iter_*.json")):
        metrics = json.loads(path.read_text())
        assert math.isfinite(metrics["loss_total"])
        assert metrics["grad_norm"] > 0 or metrics["flat_group_frac"] == 1
        if metrics["flat_group_frac"] < 1:  # else nothing was trained on, and the ratio is null
            assert abs(metrics["sampler_ratio_mean"] - 1) < 0.2  # both sides agree on the sampled tokens


def test_end_to_end(finished: runs.Finished) -> None:
    assert finished.progress.iteration == 2
    names = {path.name for path in (finished.run_dir / "metrics").iterdir()}
    assert names >= {"train_iter_000.json", "train_iter_001.json", "eval_iter_000.json", "eval_iter_002.json"}
    assert (Path(finished.run_dir) / "checkpoints" / "iter_002" / "manifest.json").exists()
