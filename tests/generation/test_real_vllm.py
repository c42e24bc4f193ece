"""Against a real vLLM, the CPU build in .venv-vllm: `make test-server`.

A start takes most of a minute, so one server serves all tests of a configuration, and ends before the next begins.
Whole runs stand in test_real_vllm_runs.py, a real model in test_real_smollm2.py, which may run at the same time.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2ForCausalLM

from grpo_mlflow.config import Config, LoraConfig, TinyConfig, resolve
from grpo_mlflow.generation import Generator, Generators, Sampling
from grpo_mlflow.generation.server.checksums import Comparison, WeightSums
from grpo_mlflow.generation.server.engine import Ask, Draw
from grpo_mlflow.generation.server.generator import ServerGenerator
from grpo_mlflow.generation.server.vllm import VLLM
from grpo_mlflow.model import lora, tiny
from grpo_mlflow.model import policy as policies
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.runs.doctor import Doctor
from grpo_mlflow.runtime.http.client import Client, Loop
from tests.support.conformance import Conformance, ShapedConformance, ids_of, prompts
from tests.support.paths import ROOT
from tests.support.real_vllm import NEEDS_VLLM, server_settings

pytestmark = NEEDS_VLLM


def build(tied: bool) -> Policy:
    """A model with random weights that vLLM's CPU attention takes (heads of 32)."""
    policy = tiny.build(TinyConfig(hidden_size=64, layers=2, heads=2, seed=3))
    if tied:
        return policy
    settings = policy.model.config.to_dict() | {"tie_word_embeddings": False}
    model = Qwen2ForCausalLM(type(policy.model.config)(**settings)).eval()
    model.load_state_dict(policy.model.state_dict())
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head.copy_(0.05 * torch.randn(head.shape, generator=torch.Generator().manual_seed(1)))
    return Policy(model, policy.tokenizer, policy.device, policy.dtype, policy.eos_ids, policy.pad_id)


def llama(plain: Policy) -> Policy:
    """The same weights as a Llama's, in which vLLM makes room for adapters of the output layer."""
    settings = plain.model.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    model.load_state_dict(plain.model.state_dict(), strict=False)  # it has no biases
    return replace(plain, model=model)


def serving(policy: Policy, folder: Path, *words: str) -> Generators:
    policy.save(folder / "model")
    base = resolve("tiny", ["generation.backend=vllm_server", "generation.server.manage=true", *words]).config
    settings = base.generation.model_copy(update={"server": server_settings(), "batch_size": 2})
    config: Config = base.model_copy(update={"generation": settings})
    return Generators(config, policy, folder / "model", folder / "model", folder / "server.log", print)


def move(policy: Policy, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (p for p in policy.model.parameters() if p.requires_grad):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


class Served(NamedTuple):
    """A model, and what samples from the server that has it, synced to version 0."""

    policy: Policy
    generator: Generator


@pytest.fixture(scope="module")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of the configuration that the test is marked with."""
    folder, words = tmp_path_factory.mktemp("served"), []
    policy = build(tied=request.param != "untied")
    if "adapter" in request.param:
        policy = llama(policy) if "llama" in request.param else policy
        policy, words = with_adapter(policy, folder / "base"), ["model.lora.rank=4", "generation.sync=lora"]
    with serving(policy, folder, *words) as generators:
        found = generators.training()
        found.sync(0)
        yield Served(policy, found)


@pytest.fixture
def policy(served: Served) -> Policy:
    return served.policy


@pytest.fixture
def generator(served: Served) -> Generator:
    return served.generator


TIED, UNTIED, ADAPTER = (
    pytest.mark.parametrize("served", [name], indirect=True) for name in ("tied", "untied", "adapter")
)
ADAPTERS = pytest.mark.parametrize("served", ["adapter", "llama adapter"], indirect=True)


def _three_syncs(policy: Policy, generator: Generator) -> None:
    seen = []
    for version in (1, 2, 3):
        move(policy, version)
        generator.sync(version)
        error = generator.metrics()["server_canary_error"]
        print(f"version {version}: log-probabilities {error:.1e} from the trainer's")
        assert error < 1e-3
        groups = generator.generate(prompts(policy), 2, Sampling(8), 0, ("x",))
        assert {c.policy_version for group in groups for c in group} == {version}
        seen.append(ids_of(groups))
    assert seen[0] != seen[1] != seen[2]


@TIED
class TestConformance(ShapedConformance):
    """The suite that every backend passes; runs first, while the server has version 0."""


@TIED
def test_a_tied_model_takes_new_weights(policy: Policy, generator: Generator) -> None:
    _three_syncs(policy, generator)


def with_adapter(policy: Policy, folder: Path) -> Policy:
    """The same model, loaded anew, with an adapter."""
    policy.save(folder)
    found = policies.load(folder, policy.device)
    lora.add(found.model, LoraConfig(rank=4), 0)
    return found


@TIED
def test_a_model_with_an_adapter_arrives_merged(policy: Policy, generator: Generator, tmp_path: Path) -> None:
    assert isinstance(generator, ServerGenerator)
    adapted = with_adapter(policy, tmp_path / "base")
    words = ["generation.backend=vllm_server", f"generation.base_url={generator.server.url}", "model.lora.rank=4"]
    base = tmp_path / "base"
    with Generators(resolve("tiny", words).config, adapted, base, base, tmp_path / "log", print) as generators:
        _three_syncs(adapted, generators.training())
    generator.server.version = None  # another run has been here
    generator.sync(4)


@ADAPTER
def test_an_adapter_arrives_beside_the_base_model(policy: Policy, generator: Generator) -> None:
    Conformance().test_behaviour_logprobs_are_the_trainers(policy, generator, 1.0)
    _three_syncs(policy, generator)
    Conformance().test_behaviour_logprobs_are_the_trainers(policy, generator, 1.0)


async def _scores_and_draws(url: str, adapter: str, asks: list[Ask], at_once: bool) -> list[list[float] | list[Draw]]:
    """What two clients of one server get: one asks for the base model, the other for an adapter."""
    engines = [VLLM(Client(url, 120.0)) for _ in range(2)]
    for engine in engines:
        await engine.connect()
    await engines[1].load_adapter(Path(adapter), Path(adapter).name)
    work: list[Coroutine[Any, Any, Any]] = []
    for engine in engines:
        for ask in asks:
            work += [engine.score(ask.token_ids), engine.complete(ask)]
    found = await asyncio.gather(*work) if at_once else [await each for each in work]
    for engine in engines:
        await engine.client.close()
    return found


@ADAPTERS
def test_two_clients_share_batches(served: Served) -> None:
    """Scores and draws, with and without an adapter: all as if each had been asked for alone."""
    assert isinstance(served.generator, ServerGenerator)
    server = served.generator.server
    move(served.policy, 4)
    served.generator.sync(4)  # vLLM caches prefixes by the adapter's name, and other tests have had versions 1 to 3
    ids = served.policy.tokenizer("12 + 34 = 46, and 70 - 25 = 45.", add_special_tokens=False).input_ids
    asks = [Ask(ids[: 2 + seed % (len(ids) - 2)], 1, Sampling(6), seed, served.policy.eos_ids) for seed in range(60)]
    loop = Loop()
    try:
        alone, together = (
            loop.run(_scores_and_draws(server.url, str(server.folder), asks, at_once)) for at_once in (False, True)
        )
    finally:
        loop.close()
    assert alone[: len(alone) // 2] != alone[len(alone) // 2 :]
    for one, other in zip(alone, together, strict=True):
        if isinstance(one[0], Draw):
            assert isinstance(other[0], Draw)
            assert one[0].token_ids == other[0].token_ids
            assert one[0].logprobs == pytest.approx(other[0].logprobs, abs=1e-4)
        else:
            assert one == pytest.approx(other, abs=1e-4)


async def _adapter_sums(url: str) -> Sequence[WeightSums] | None:
    engine = VLLM(Client(url, 120.0))
    await engine.connect()
    found = await engine.adapter_sums()
    await engine.client.close()
    return found


@ADAPTERS
def test_an_adapters_tensors_are_compared(served: Served, tmp_path: Path) -> None:
    assert isinstance(served.generator, ServerGenerator)
    server, loop, comparison = served.generator.server, Loop(), Comparison(served.policy.device)
    move(served.policy, 2)
    served.policy.save(tmp_path / "older")
    move(served.policy, 3)
    served.generator.sync(5)
    try:
        (sums,) = loop.run(_adapter_sums(server.url)) or ()
    finally:
        loop.close()
    assert server.folder is not None
    assert comparison.wrong_adapter(server.folder, sums) == []
    assert len(comparison.wrong_adapter(tmp_path / "older", sums) or ()) == 2 * 2 * 7  # A and B of each linear layer


@TIED
def test_the_doctor_and_the_gpu_tests_pass_on_it(generator: Generator, tmp_path: Path) -> None:
    assert isinstance(generator, ServerGenerator)
    url, folder = generator.server.url, generator.server.folder
    assert folder is not None
    words = [f"model.train_id={folder}", "generation.backend=vllm_server", f"generation.base_url={url}"]
    config = resolve("tiny", [*words, f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]).config
    began = time.monotonic()
    checks = list(Doctor(config, tmp_path).examine())
    print(f"doctor: {time.monotonic() - began:.1f} s")
    assert [str(check) for check in checks if check.state != "ok"] == []
    there = {"GRPO_TEST_SERVER": url, "GRPO_TEST_MODEL": str(folder), "GRPO_TEST_DEVICE": "cpu"}
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/test_gpu.py"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **there}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout


@UNTIED
def test_an_untied_model_takes_new_weights(policy: Policy, generator: Generator) -> None:
    _three_syncs(policy, generator)
