"""SmolLM2 on a real vLLM: weights after steps as small as a run's, and what is refused. `make test-server`.

Faults are planted between trainer and server, which both know nothing of it: the server is told to load other weights
than those that were written for it, or not told to forget its cached prefixes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from grpo_mlflow import runs
from grpo_mlflow.config import LoraConfig, resolve
from grpo_mlflow.errors import ServerFailed
from grpo_mlflow.generation import Generators, Sampling
from grpo_mlflow.generation.server import canary
from grpo_mlflow.generation.server.generator import ServerGenerator
from grpo_mlflow.model import lora
from grpo_mlflow.model import policy as policies
from grpo_mlflow.model.policy import Policy
from tests.support.conformance import Conformance, prompts
from tests.support.go_between import Fault, GoBetween
from tests.support.old_weights import KeepsPrefixes, adapter_old, all_old, one_block_old, output_layer_old
from tests.support.real_vllm import NEEDS_SMOLLM2, PYTHON, SMOLLM2, kill_server_once, running

pytestmark = NEEDS_SMOLLM2
SMALLEST, LEARNING_RATES = 1e-6, (1e-6, 1e-5, 2e-5)
GIVEN = "was given new weights, but"


def step(policy: Policy, lr: float, seed: int) -> None:
    """Move every weight that is trained by `lr`, up or down, as AdamW's first step does."""
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (p for p in policy.model.parameters() if p.requires_grad):
            parameter.add_(torch.empty_like(parameter).bernoulli_(generator=chance).mul_(2).sub_(1), alpha=lr)


class Served:
    """A policy whose weights a server gets through a go-between, one version after the other."""

    def __init__(self, policy: Policy, generator: ServerGenerator[Any], url: str, between: GoBetween) -> None:
        self.policy, self.generator, self.url, self.between = policy, generator, url, between
        self.version, self.retries = 0, 0.0
        generator.sync(0)

    def moves(self, lr: float) -> float:
        """Move the weights, let the server have them, and return how far its log-probabilities are from ours."""
        self.version += 1
        step(self.policy, lr, self.version)
        began = time.monotonic()
        self.generator.sync(self.version)
        metrics = self.generator.metrics()
        error, self.retries = metrics["server_canary_error"], self.retries + metrics["server_retries"]
        print(f"lr {lr:g}: {error:.2g} from the trainer's, {time.monotonic() - began:.1f} s")
        return error

    def kept(self, folder: Path) -> Path:
        """Return a folder that stays, with the weights that the server was given last."""
        assert self.generator.server.folder is not None
        return Path(shutil.copytree(self.generator.server.folder, folder, copy_function=os.link))


@contextmanager
def serving(policy: Policy, url: str, folder: Path, *words: str) -> Iterator[Served]:
    dtype = str(policy.dtype).removeprefix("torch.")
    settings = ["generation.backend=vllm_server", f"generation.sync_dir={folder}", "generation.retry_seconds=60"]
    with GoBetween(url) as between:
        words = (*settings, f"generation.base_url={between.url}", f"model.dtype={dtype}", *words)
        with Generators(resolve("tiny", words).config, policy, SMOLLM2, SMOLLM2, folder / "log", print) as generators:
            generator = generators.training()
            assert isinstance(generator, ServerGenerator)
            yield Served(policy, generator, url, between)


class Start(NamedTuple):
    dtype: str
    arguments: tuple[str, ...] = ()
    lora_rank: int | None = None


STARTS = {
    "bfloat16": Start("bfloat16", lora_rank=8),
    "float32": Start("float32"),
    "raw": Start("bfloat16", ("--logprobs-mode", "raw_logprobs")),
}
BFLOAT16, FLOAT32, RAW = (pytest.mark.parametrize("served", [name], indirect=True) for name in STARTS)


@pytest.fixture(scope="module")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """All weights on the server that the test is marked with."""
    start, folder, began = STARTS[request.param], tmp_path_factory.mktemp("served"), time.monotonic()
    with running(SMOLLM2, start.dtype, folder / "log", *start.arguments, lora_rank=start.lora_rank) as url:
        print(f"{request.param}: started in {time.monotonic() - began:.0f} s")
        with serving(load(start.dtype), url, folder / "weights") as found:
            yield found


def load(dtype: str) -> Policy:
    return policies.load(SMOLLM2, torch.device("cpu"), dtype)


def prefix_hits(url: str) -> float:
    """Return how many tokens of prompts the server has taken from its prefix cache so far."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        found = re.findall(r"^vllm:prefix_cache_hits_total\{.*\} (\S+)$", answer.read().decode(), re.MULTILINE)
    assert len(found) == 1
    return float(found[0])


@BFLOAT16
def test_adapters_after_small_steps_raise_no_alarm_and_an_old_one_does(served: Served, tmp_path: Path) -> None:
    """Runs first, while the server has the base model's weights."""
    adapted = load("bfloat16")
    lora.add(adapted.model, LoraConfig(rank=8), 0)
    words = ("generation.sync=lora", "model.lora.rank=8")
    with serving(adapted, served.url, tmp_path / "adapters", *words) as beside:
        for lr in 2 * LEARNING_RATES:
            assert beside.moves(lr) < canary.TOLERANCE[torch.bfloat16]
        assert beside.between.paths.count("/v1/load_lora_adapter") == 7  # none a second time
        old = beside.between.planted(adapter_old(beside.kept(tmp_path / "old")))
        with pytest.raises(ServerFailed, match=GIVEN) as caught, old:
            beside.moves(SMALLEST)
        print(caught.value)
        beside.moves(SMALLEST)


@BFLOAT16
def test_small_steps_in_bfloat16_raise_no_alarm(served: Served) -> None:
    before = served.between.paths.count("/update_weight_version")
    for lr in 2 * LEARNING_RATES:
        assert 1e-3 < served.moves(lr) < canary.TOLERANCE[torch.bfloat16]  # there is rounding to be mistaken
    assert served.between.paths.count("/update_weight_version") == before + 6  # none a second time


@BFLOAT16
@pytest.mark.parametrize("plant", [all_old, output_layer_old, one_block_old])
def test_old_weights_are_caught_at_that_load_in_bfloat16(
    served: Served, plant: Callable[[Path], Fault], tmp_path: Path
) -> None:
    old_weights_are_caught(served, plant, tmp_path)


def old_weights_are_caught(served: Served, plant: Callable[[Path], Fault], folder: Path) -> None:
    wrong, old = rf"{GIVEN} \d+ of its \d+ tensors are not what was sent", plant(served.kept(folder / "old"))
    with pytest.raises(ServerFailed, match=wrong) as caught, served.between.planted(old):
        served.moves(SMALLEST)
    print(caught.value)
    served.moves(SMALLEST)


@BFLOAT16
def test_prefixes_of_old_weights_are_not_read_though_the_server_keeps_them(served: Served) -> None:
    """One step in bfloat16 is less than rounding, so a token drawn after an old prefix would not be told."""
    long = replace(prompts(served.policy)[0], token_ids=canary.tokens(served.policy)[::-1])

    def read() -> float:
        before = prefix_hits(served.url)
        served.generator.generate([long], 1, Sampling(4), 0, ("x",))
        return prefix_hits(served.url) - before

    with served.between.planted(KeepsPrefixes(one_salt=True)):
        served.moves(SMALLEST)
        assert read() == 0
        served.moves(SMALLEST)
        assert read() == 128  # a block of old weights, which only the salt prevents
    with served.between.planted(KeepsPrefixes(one_salt=False)):
        served.moves(SMALLEST)
        assert read() == 0
        assert read() == 128  # of these weights
        served.moves(SMALLEST)
        assert read() == 0


@FLOAT32
def test_small_steps_in_float32_raise_no_alarm(served: Served) -> None:
    before = served.between.paths.count("/update_weight_version")
    for lr in LEARNING_RATES:
        assert served.moves(lr) < 1e-4
    assert served.between.paths.count("/update_weight_version") == before + 3
    Conformance().test_behaviour_logprobs_are_the_trainers(served.policy, served.generator, 1.0)


@FLOAT32
def test_one_old_block_is_caught_in_float32(served: Served, tmp_path: Path) -> None:
    old_weights_are_caught(served, one_block_old, tmp_path)


@FLOAT32
def test_a_large_step_tells_prefixes_of_old_weights(served: Served) -> None:
    """After one of 1e-6 the token drawn is 1.5e-6 off, after one of 1e-2 .019, and .004 are allowed."""
    reads = "it reads cached prefixes of other weights"
    with served.between.planted(KeepsPrefixes(one_salt=True)):
        served.moves(SMALLEST)
        with pytest.raises(ServerFailed, match=reads) as caught:
            served.moves(1e-2)
    print(caught.value)


@RAW
def test_unprocessed_log_probabilities_are_refused(served: Served, tmp_path: Path) -> None:
    hot = serving(served.policy, served.url, tmp_path, "generation.temperature=0.7")
    with pytest.raises(ServerFailed, match="they leave out temperature") as caught, hot:
        pass
    print(caught.value)
    assert "--logprobs-mode processed_logprobs" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_server_without_the_extension_is_refused_at_once(tmp_path: Path) -> None:
    """On a CPU, vLLM's own loader leaves the output layer of a model with tied weights old."""
    with running(SMOLLM2, "bfloat16", tmp_path / "log", "--worker-extension-cls", "") as url:
        plain = serving(load("bfloat16"), url, tmp_path / "weights")
        with pytest.raises(ServerFailed, match="without our worker extension") as caught, plain:
            pass
    print(caught.value)
    assert "--worker-extension-cls grpo_vllm_worker.WeightLoader" in str(caught.value)
    assert not any((tmp_path / "weights").glob("*"))  # before the weights were written


def test_a_run_that_samples_ahead_in_bfloat16_survives_kill_9_of_its_server(shared_store: str) -> None:
    store = Path(shared_store.removeprefix("sqlite:///")).parent
    killed = kill_server_once(lambda: any(store.rglob("train_iter_001.json")))
    words = [f"model.train_id={SMOLLM2}", "model.dtype=bfloat16", f"tracking.uri={shared_store}"]
    words += ["generation.backend=vllm_server", "generation.async_rollouts=1", "generation.server.manage=true"]
    words += [f"generation.server.python={PYTHON}", "generation.server.device=cpu"]
    words += ['generation.server.arguments=["--max-model-len","512"]', "generation.max_new_tokens=8"]
    words += ["train.iterations=3", "train.lr=1e-6", "train.lr_warmup_steps=0", "train.batch_size=8"]
    words += ["data.task=python:tests.support.vowels:Vowels", "data.problems_per_iteration=2"]
    words += ["data.rollouts_per_problem=4"]
    words += ["eval.num_ids=2", "eval.replicates=4", "eval.interval=3", "checkpoint.save_interval=0"]
    finished = runs.train(resolve("tiny", words))
    assert len(killed) == 1
    metrics = [
        json.loads(path.read_text()) for path in sorted((finished.run_dir / "metrics").glob("train_iter_*.json"))
    ]
    assert len(metrics) == 3
    assert sum(each["server_restarts"] for each in metrics) >= 1
    for each in metrics:
        assert each["server_canary_error"] < canary.TOLERANCE[torch.bfloat16]
        assert 0.9 < each["sampler_ratio_mean"] < 1.1
        print({name: each[name] for name in ("sampler_ratio_mean", "server_canary_error", "seconds_sync")})
