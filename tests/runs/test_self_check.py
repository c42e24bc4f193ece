"""What a run finds out about its model before it is opened, and how long it remembers that."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from grpo_mlflow.errors import ModelError
from grpo_mlflow.forward import trial, ways
from grpo_mlflow.generation.local import ways as sampling
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.runs import self_check
from tests.support.llama_family import DYNAMIC
from tests.support.small_models import SIZES


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRPO_MLFLOW_CACHE", str(tmp_path))
    return tmp_path / "ways"


def of(model: LlamaForCausalLM | MistralForCausalLM) -> Policy:
    return Policy(model.eval(), None, torch.device("cpu"), torch.float32, (2,), 0, name="mine")


def llama(seed: int = 0, **settings: Any) -> Policy:
    torch.manual_seed(seed)
    return of(LlamaForCausalLM(LlamaConfig(**{**SIZES, **settings})))


def test_what_was_found_is_kept_and_believed(cache: Path) -> None:
    policy = llama()
    self_check.prove(policy, 40)
    assert ways.scoring(policy.model) == ways.Scoring("packed", written_out=True)
    assert sampling.sampler(policy) == sampling.Sampler("packed", written_out=True)
    (kept,) = cache.iterdir()
    found = json.loads(kept.read_text())
    found["scoring"] |= {"way": "alike", "written_out": False}
    kept.write_text(json.dumps(found))
    same = llama()
    self_check.prove(same, 40)
    assert ways.scoring(same.model).way == "alike"


@pytest.mark.parametrize("written_out", [True, False])
def test_what_was_kept_computes_what_was_found(written_out: bool) -> None:
    """Another process reads it, whose model still has its own attention."""
    first, second = (replace(llama(), written_out=written_out, dtype=torch.bfloat16) for _ in range(2))
    for policy in (first, second):
        self_check.prove(policy, 40)
        tried = ways.trials(policy.model, [trial.few(200, seed=5)])
        found = replace(ways.scoring(policy.model), written_out=False)
        assert found.way == "packed"
        assert ways.is_right(policy.model, found, tried)
        assert sampling.is_right(policy, sampling.sampler(policy), tried)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"scoring": {"path": 1}}'])
def test_a_damaged_file_is_found_out_anew(cache: Path, damage: str) -> None:
    self_check.prove(llama(), 40)
    (kept,) = cache.iterdir()
    kept.write_text(damage)
    policy = llama()
    self_check.prove(policy, 40)
    assert ways.scoring(policy.model).way == "packed"
    assert json.loads(kept.read_text())["scoring"]["way"] == "packed"


def test_another_model_length_or_type_is_tried_anew(cache: Path) -> None:
    for count, (policy, most) in enumerate(
        [
            (llama(), 40),
            (llama(seed=1), 40),
            (llama(), 41),
            (replace(llama(), dtype=torch.bfloat16), 40),
            (replace(llama(), written_out=False), 40),
            (llama(rms_norm_eps=1e-5), 40),
        ],
        start=1,
    ):
        self_check.prove(policy, most)
        assert len(list(cache.iterdir())) == count


def test_angles_that_are_stretched_are_refused_only_where_a_row_may_reach_them() -> None:
    settings: dict[str, Any] = {"rope_parameters": DYNAMIC, "max_position_embeddings": 64}
    self_check.prove(llama(**settings), 64)
    with pytest.raises(
        ModelError, match=r"^model 'mine': in texts of \d+ tokens.*stretched.*up to 90 \(generation.max"
    ) as e:
        self_check.prove(llama(**settings), 90)
    assert "\n" not in str(e.value)


def test_a_window_counts_only_where_a_row_may_be_longer() -> None:
    """The passes of our own know no window: they are right as long as all rows are shorter than it."""
    for most, sampler in ((30, sampling.Sampler("packed", written_out=True)), (60, sampling.Sampler("cache"))):
        torch.manual_seed(0)
        policy = of(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=32)))
        self_check.prove(policy, most)
        assert ways.scoring(policy.model).way == "padded"
        assert replace(sampling.sampler(policy), reason=None) == sampler
