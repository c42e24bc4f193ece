"""The conformance suite over the local generator and over both servers' tongues, spoken by a fake over real HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo_mlflow.config import Config, GenerationConfig
from grpo_mlflow.generation import Generator, Generators, LocalGenerator
from grpo_mlflow.policy import Policy
from tests.conformance import Conformance, ShapedConformance
from tests.fake_server import FakeServer


def served(policy: Policy, server: FakeServer, **settings: object) -> Generators:
    """Generators that sample from a fake server."""
    content: dict[str, object] = {"backend": f"{server.dialect}_server", "base_url": server.url, "batch_size": 2}
    content |= {"top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "retry_seconds": 20.0, "timeout": 20.0}
    config = Config(generation=GenerationConfig.model_validate(content | settings))
    return Generators(config, policy, server.folder, server.folder, server.folder / "server.log", print)


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


class TestVLLM(ShapedConformance):
    @pytest.fixture
    def generator(self, policy: Policy, folder: Path) -> Iterator[Generator]:
        yield from speaking("vllm", policy, folder)


class TestSGLang(Conformance):
    @pytest.fixture
    def generator(self, policy: Policy, folder: Path) -> Iterator[Generator]:
        yield from speaking("sglang", policy, folder)
