"""A generator that takes long says how far it is."""

from __future__ import annotations

import re
import time
from itertools import count
from pathlib import Path

from grpo_mlflow.generation import Sampling
from grpo_mlflow.generation.local.generator import LocalGenerator
from grpo_mlflow.generation.server.generator import ServerGenerator
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.runtime.pace import Pace
from tests.support.conformance import prompts
from tests.support.fake_server import SAMPLE, Answer, FakeServer, Fault
from tests.support.served import served


def paced(said: list[str], seconds: float) -> Pace:
    """Return a pace whose clock goes on by so many seconds whenever it is looked at."""
    return Pace(said.append, count(0.0, seconds).__next__)


def shares(said: list[str], what: str) -> list[int]:
    found = [re.match(rf"{what}: (\d+)% after ", line) for line in said]
    assert all(found), said
    return [int(match[1]) for match in found if match]


def test_in_this_process_it_counts_tokens_over_all_batches(policy: Policy) -> None:
    """One prompt at a time, of three: the second begins at a third."""
    said: list[str] = []
    LocalGenerator(policy, 1, pace=paced(said, 60)).generate(prompts(policy), 2, Sampling(2), 0, ("eval", 3))
    found = shares(said, "evaluation")
    assert found == sorted(found)
    assert {0, 33, 67} <= {*found} <= {0, 17, 33, 50, 67, 83}
    assert "left" not in said[0]
    assert all(", at most " in line for line in said[1:])


def test_of_a_server_it_counts_prompts_that_are_answered(policy: Policy, folder: Path) -> None:
    said: list[str] = []

    def late(server: FakeServer, answer: Answer) -> Answer:
        time.sleep(0.5)
        return answer

    with FakeServer("vllm", folder) as server, served(policy, server) as generators:
        generators.training().sync(0)
        server.faults.append(Fault(SAMPLE["vllm"], late, loads=0, nth=2))
        shared = generators.training()
        assert isinstance(shared, ServerGenerator)
        generator = ServerGenerator(shared.server, policy, 1, None, pace=paced(said, 20))
        groups = generator.generate(prompts(policy), 2, Sampling(4), 0, ("train", 0))
    assert len(groups) == 3
    found = shares(said, "rollouts")
    assert found == sorted(found)
    assert {*found} <= {0, 33, 67}
    assert {*found} & {33, 67}, "while one was late, others were there"
