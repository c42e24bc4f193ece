"""A server that gives up its memory while nothing is sampled is awake whenever it is asked, and draws the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_mlflow.config import resolve
from grpo_mlflow.errors import ConfigError
from grpo_mlflow.generation import Sampling
from grpo_mlflow.generation.server.generator import ServerGenerator
from grpo_mlflow.generation.server.launch import launch_as
from grpo_mlflow.model.policy import Policy
from tests.support.conformance import prompts
from tests.support.fake_server import FakeServer
from tests.support.served import served

OWN = ("generation.backend=vllm_server", "generation.server.manage=true", "generation.server.sleep=true")


def test_it_wakes_for_whatever_it_is_asked(policy: Policy, folder: Path) -> None:
    with FakeServer("vllm", folder) as server, served(policy, server) as generators:
        generator = generators.training()
        assert isinstance(generator, ServerGenerator)

        def drawn() -> list[tuple[int, ...]]:
            found = generator.generate(prompts(policy), 2, Sampling(4), 0, ("train", 0))
            return [each.token_ids for row in found for each in row]

        generator.sync(0)
        awake = drawn()
        generator.rest()
        assert server.asleep
        assert drawn() == awake
        assert not server.asleep
        generator.rest()
        generator.sync(1)  # the weights of the next iteration
        assert not server.asleep
        generator.rest()
        generator.rest()
        server.restart()  # a server that has just been started is awake, and lacks the weights
        assert drawn() == awake


def test_its_start_allows_it() -> None:
    command = launch_as(resolve("tiny", OWN).config, "vllm_server", "model", 1).command
    assert "--enable-sleep-mode" in command
    assert "--enable-sleep-mode" not in launch_as(resolve("tiny", OWN[:2]).config, "vllm_server", "model", 1).command


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("generation.server.manage=false", "generation.base_url=http://127.0.0.1:1"), "that the run started"),
        (("generation.backend=sglang_server",), "only vLLM has a sleep mode"),
        (("generation.async_rollouts=1",), "the server samples during the update"),
    ],
)
def test_where_it_cannot_be_it_is_refused(words: tuple[str, ...], why: str) -> None:
    with pytest.raises(ConfigError, match=f"generation.server.sleep = true: .*{why}.*allowed: false, or generation."):
        resolve("tiny", [*OWN, *words])
