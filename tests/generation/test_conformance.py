"""The conformance suite over the local generator and over both servers' tongues, spoken by a fake over real HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo_mlflow.generation import Generator, LocalGenerator
from grpo_mlflow.model.policy import Policy
from tests.support.conformance import Conformance, ShapedConformance
from tests.support.fake_server import FakeServer
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


class TestVLLM(ShapedConformance):
    @pytest.fixture
    def generator(self, policy: Policy, folder: Path) -> Iterator[Generator]:
        yield from speaking("vllm", policy, folder)


class TestSGLang(Conformance):
    @pytest.fixture
    def generator(self, policy: Policy, folder: Path) -> Iterator[Generator]:
        yield from speaking("sglang", policy, folder)
