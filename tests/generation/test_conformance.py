"""The conformance suite over the local generator and over each server's tongue, spoken by a fake over real HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo_mlflow.config import ServerConfig, resolve
from grpo_mlflow.config.engines import SERVERS
from grpo_mlflow.generation import Generator, LocalGenerator
from grpo_mlflow.generation.server.launch import engine_class, launch
from grpo_mlflow.model.policy import Policy
from tests.support.conformance import Conformance, ShapedConformance
from tests.support.fake_server import DIALECTS, FakeServer
from tests.support.served import served


def speaking(dialect: str, policy: Policy, folder: Path) -> Iterator[Generator]:
    """Yield a generator that samples from a fake server of this tongue, which has the policy's weights."""
    with FakeServer(dialect, folder) as server, served(policy, server) as generators:
        generator = generators.training()
        generator.sync(0)
        yield generator


class TestLocal(ShapedConformance):
    @pytest.fixture
    def generator(self, policy: Policy) -> Generator:
        return LocalGenerator(policy, batch_size=2)


class TestShaped(ShapedConformance):
    @pytest.fixture(params=[name for name, dialect in DIALECTS.items() if dialect.shaped_logprobs])
    def generator(self, policy: Policy, folder: Path, request: pytest.FixtureRequest) -> Iterator[Generator]:
        yield from speaking(request.param, policy, folder)


class TestUnshaped(Conformance):
    @pytest.fixture(params=[name for name, dialect in DIALECTS.items() if not dialect.shaped_logprobs])
    def generator(self, policy: Policy, folder: Path, request: pytest.FixtureRequest) -> Iterator[Generator]:
        yield from speaking(request.param, policy, folder)


@pytest.mark.parametrize("name", SERVERS)
def test_every_kind_of_server_can_be_chosen_started_and_spoken_to(name: str) -> None:
    assert resolve("tiny", [f"generation.backend={name}", "generation.base_url=http://h:1"]).config
    found = launch(name, ServerConfig(device="cpu"), "org/model", 7, "float32")
    assert {"org/model", "7"} <= set(found.command)
    assert engine_class(name).remedies.install
    assert DIALECTS[name.removesuffix("_server")].shaped_logprobs == SERVERS[name].shaped_logprobs
