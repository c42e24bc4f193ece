"""Adapters on servers: sent beside the base model, or merged into whole weights, and proven either way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from grpo_mlflow.config import LoraConfig, ServerConfig, resolve
from grpo_mlflow.errors import ServerFailed, UserError
from grpo_mlflow.generation import Generator, Generators, Sampling
from grpo_mlflow.generation.server.launch import launch
from grpo_mlflow.model import lora, policy
from grpo_mlflow.model.policy import Policy
from tests.support.adapters import move_adapter
from tests.support.conformance import Conformance, ShapedConformance, ids_of, prompts
from tests.support.fake_server import DIALECTS, FakeServer, Quirks
from tests.support.served import served

EACH_DIALECT = pytest.mark.parametrize("dialect", DIALECTS)


@pytest.fixture
def adapted(folder: Path) -> Policy:
    """The model of `folder`, which a server starts with, and an adapter."""
    found = policy.load(folder, torch.device("cpu"))
    lora.add(found.model, LoraConfig(rank=4), 0)
    return found


def speaking(dialect: str, policy: Policy, folder: Path) -> Iterator[Generator]:
    with FakeServer(dialect, folder) as server, served(policy, server, sync="lora") as generators:
        generator = generators.training()
        generator.sync(0)
        assert not server.loads
        yield generator


class Adapted:
    @pytest.fixture
    def policy(self, adapted: Policy) -> Policy:
        move_adapter(adapted)
        return adapted


class TestShaped(Adapted, ShapedConformance):
    @pytest.fixture(params=[name for name, dialect in DIALECTS.items() if dialect.shaped_logprobs])
    def generator(self, policy: Policy, folder: Path, request: pytest.FixtureRequest) -> Iterator[Generator]:
        yield from speaking(request.param, policy, folder)


class TestUnshaped(Adapted, Conformance):
    @pytest.fixture(params=[name for name, dialect in DIALECTS.items() if not dialect.shaped_logprobs])
    def generator(self, policy: Policy, folder: Path, request: pytest.FixtureRequest) -> Iterator[Generator]:
        yield from speaking(request.param, policy, folder)


@EACH_DIALECT
@pytest.mark.parametrize("sync", ["lora", "reload"])
def test_each_sync_brings_the_adapter(adapted: Policy, folder: Path, dialect: str, sync: str) -> None:
    with FakeServer(dialect, folder) as server, served(adapted, server, sync=sync) as generators:
        generator, seen = generators.training(), []
        for version in range(3):
            generator.sync(version)
            groups = generator.generate(prompts(adapted), 2, Sampling(8), 0, ("x",))
            assert generator.metrics()["server_canary_error"] < 1e-5
            seen.append(ids_of(groups))
            move_adapter(adapted, version)
        assert seen[0] != seen[1] != seen[2]
        assert (len(server.adapters), len(server.loads)) == ((1, 0) if sync == "lora" else (0, 3))


@EACH_DIALECT
def test_the_untrained_model_is_measured_before_there_is_an_adapter(folder: Path, dialect: str) -> None:
    untrained = policy.load(folder, torch.device("cpu"))
    with FakeServer(dialect, folder) as server, served(untrained, server, sync="lora") as generators:
        generators.evaluation().sync(0)
        assert not server.adapters
        assert not server.loads


@EACH_DIALECT
def test_a_server_that_was_restarted_gets_its_adapter_again(adapted: Policy, folder: Path, dialect: str) -> None:
    with FakeServer(dialect, folder) as server, served(adapted, server, sync="lora") as generators:
        move_adapter(adapted)
        generator = generators.training()
        generator.sync(0)
        before = generator.generate(prompts(adapted), 2, Sampling(8), 0, ("x",))
        server.restart()
        assert generator.generate(prompts(adapted), 2, Sampling(8), 0, ("x",)) == before
        assert len(server.adapters) == 1


@EACH_DIALECT
def test_a_server_that_keeps_the_first_adapter_is_caught(adapted: Policy, folder: Path, dialect: str) -> None:
    quirks = Quirks(keeps_old_adapter=True)
    with FakeServer(dialect, folder, quirks=quirks) as server, served(adapted, server, sync="lora") as generators:
        generators.training().sync(0)
        move_adapter(adapted)
        with pytest.raises(ServerFailed, match="given new weights, but its log-probabilities of fixed tokens"):
            generators.training().sync(1)


@EACH_DIALECT
def test_a_server_that_takes_no_adapters_is_refused(adapted: Policy, folder: Path, dialect: str) -> None:
    quirks = Quirks(without_lora=True)
    with FakeServer(dialect, folder, quirks=quirks) as server, served(adapted, server, sync="lora") as generators:
        with pytest.raises(ServerFailed, match=r"--enable-lora.* or choose generation\.sync=reload") as caught:
            generators.training().sync(0)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("backend", "rank", "words"),
    [
        ("vllm_server", 4, "--enable-lora --max-lora-rank 8"),
        ("vllm_server", 64, "--enable-lora --max-lora-rank 64"),
        ("sglang_server", 4, "--enable-lora --max-lora-rank 4 --lora-target-modules all"),
    ],
)
def test_a_server_of_our_own_is_started_for_adapters(backend: str, rank: int, words: str) -> None:
    found = launch(backend, ServerConfig(device="cpu"), "org/model", 7, "float32", rank)
    assert words in " ".join(found.command)
    assert "lora" not in " ".join(launch(backend, ServerConfig(device="cpu"), "org/model", 7, "float32").command)
    assert found.environment.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING") == ("1" if backend == "vllm_server" else None)


def test_a_static_server_cannot_start_from_an_adapter(adapted: Policy, tmp_path: Path) -> None:
    adapted.save(tmp_path / "adapter")
    words = ("generation.backend=vllm_server", "generation.server.manage=true", "generation.sync=none")
    folder, config = tmp_path / "adapter", resolve("tiny", words).config
    generators = Generators(config, adapted, folder, folder, tmp_path / "log", print)
    with generators, pytest.raises(UserError, match=r"is an adapter.*grpo merge"):
        generators.training()
