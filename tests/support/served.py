"""Generators over a fake server."""

from __future__ import annotations

from grpo_mlflow.config import Config, GenerationConfig
from grpo_mlflow.generation import Generators
from grpo_mlflow.model.policy import Policy
from tests.support.fake_server import FakeServer


def served(policy: Policy, server: FakeServer, **settings: object) -> Generators:
    """Generators that sample from a fake server."""
    content: dict[str, object] = {"backend": f"{server.dialect}_server", "base_url": server.url, "batch_size": 2}
    content |= {"top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "retry_seconds": 20.0, "timeout": 20.0}
    config = Config(generation=GenerationConfig.model_validate(content | settings))
    return Generators(config, policy, server.folder, server.folder, server.folder / "server.log", print)
