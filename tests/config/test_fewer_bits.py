"""Settings of weights and states in fewer bits: what contradicts another is one line, before anything is loaded."""

from __future__ import annotations

import sys

import pytest

from grpo_mlflow.config import idle, resolve
from grpo_mlflow.errors import ConfigError

ADAPTER = "model.lora.rank=4"
SHARDED = "train.sharding=full"
SERVED = ("generation.backend=vllm_server", "generation.base_url=http://127.0.0.1:1")


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        resolve("tiny", [*overrides])
    return str(error.value)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ("model.quantization=nf4",),
            "model.quantization = 'nf4': weights in 4 bits cannot be trained; allowed: none, or",
        ),
        (
            ("model.quantization=nf4", ADAPTER, *SERVED, "generation.sync=lora"),
            "generation.sync = 'lora': the server would compute with the base model in float32, and training with "
            "model.quantization = 'nf4'; allowed: reload",
        ),
        (
            ("model.frozen_dtype=bfloat16", ADAPTER, *SERVED, "generation.sync=lora"),
            "generation.sync = 'lora': the server would compute with the base model in float32, and training with "
            "model.frozen_dtype = 'bfloat16'; allowed: reload",
        ),
        (
            ("model.quantization=nf4", ADAPTER, SHARDED),
            "model.quantization = 'nf4': with train.sharding = 'full' weights are cut by rows, which those packed in 4 "
            "bits do not have; allowed: none",
        ),
    ],
)
def test_contradictions_are_one_line(overrides: tuple[str, ...], line: str) -> None:
    assert line in refused(*overrides)


def test_what_goes_together_is_taken() -> None:
    for overrides in (
        (ADAPTER, "model.quantization=nf4", *SERVED, "generation.sync=reload"),
        (ADAPTER, "model.frozen_dtype=bfloat16", "model.dtype=bfloat16", *SERVED, "generation.sync=lora"),
        (ADAPTER, "model.frozen_dtype=bfloat16", "model.quantization=nf4"),
        ("model.frozen_dtype=bfloat16", "train.optimizer=adamw8bit", "train.optimizer_offload=cpu"),
        (SHARDED, "train.optimizer=adamw8bit", "train.optimizer_offload=cpu", "model.ref_device=cpu"),
        (SHARDED, "model.dtype=bfloat16", "model.cast_lm_head_to_fp32=true"),
        (SHARDED, *SERVED, "generation.behaviour_logprobs=recompute"),
    ):
        resolve("tiny", [*overrides])


@pytest.mark.parametrize(
    ("overrides", "key"),
    [((ADAPTER, "model.quantization=nf4"), "model.quantization"), (("train.optimizer=adamw8bit",), "train.optimizer")],
)
def test_a_missing_package_is_named(overrides: tuple[str, ...], key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    found = refused(*overrides)
    assert found.startswith(f"{key} = ")
    assert "the package bitsandbytes is not installed" in found
    assert "pip install -e '.[quantized]'" in found


@pytest.mark.parametrize(
    ("override", "others"),
    [
        ("model.frozen_dtype=bfloat16", ("train.kl_coef=0",)),
        ("model.cast_lm_head_to_fp32=true", ()),
        ("train.optimizer_offload=cpu", ("model.device=cpu",)),
    ],
)
def test_what_has_no_effect_is_said(override: str, others: tuple[str, ...]) -> None:
    key = override.partition("=")[0]
    config = resolve("tiny", [override, *others]).config
    assert any(line.startswith(f"{key} has no effect") for line in idle.warnings(config, [key]))
