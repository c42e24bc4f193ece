"""Groups on disk: what is read is what was written, and any JSON reader can read it."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from grpo_mlflow.training import rollout_files
from grpo_mlflow.types import Completion, Group, Problem, Prompt, Rollout, Verdict


def group(text: str, logprobs: tuple[float, ...], payload: dict[str, object]) -> Group:
    problem = Problem("own/train/3", 3, ({"role": "user", "content": "1+2=?"},), payload)
    completion = Completion(tuple(range(len(logprobs))), text, logprobs, "stop", 4)
    rollout = Rollout(
        Prompt(problem.id, problem.messages, (7, 8)), completion, Verdict(1.0, {"correct": 0.9}, True, None)
    )
    return Group(problem, (rollout, rollout), (0.1 + 0.2, -1e-7))


@pytest.mark.parametrize(
    "text", ["3", "", 'a "quoted"\nline\r\x00\u2028\x85 end', "\u4e09 \U0001f600", "half a pair: \ud83d"]
)
def test_groups_come_back_as_they_were(text: str, tmp_path: Path) -> None:
    drawn = tuple(np.random.default_rng(0).normal(size=200).astype(np.float32).tolist())
    smallest = (5e-324, -1.7976931348623157e308, -0.0, 0.1)
    groups = [group(text, drawn + smallest, {"answer": 2**70, "of": [1, {"deep": None}]}), group("x", (), {})]
    path = tmp_path / "new" / "iter_000.jsonl"
    rollout_files.write(path, groups)
    assert rollout_files.read(path) == groups
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    assert len(lines) == 2
    assert json.loads(lines[0])["rollouts"][1]["text"] == text


def test_a_value_that_is_no_number_stays_one(tmp_path: Path) -> None:
    rollout_files.write(tmp_path / "x", [group("3", (math.nan, math.inf), {"limit": -math.inf})])
    (found,) = rollout_files.read(tmp_path / "x")
    logprobs = found.rollouts[0].completion.behaviour_logprobs
    assert math.isnan(logprobs[0])
    assert logprobs[1] == math.inf
    assert found.problem.payload == {"limit": -math.inf}


def test_a_payload_that_json_cannot_hold_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Decimal"):
        rollout_files.write(tmp_path / "x", [group("3", (-0.5,), {"answer": Decimal("1.5")})])
