"""A server's proof of an adapter beside the base model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from grpo_mlflow.config import LoraConfig
from grpo_mlflow.errors import ServerFailed
from grpo_mlflow.generation.server.checksums import Comparison, TensorSum, WeightSums
from grpo_mlflow.model import lora
from grpo_mlflow.model import policy as policies
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.serverside.grpo_vllm_worker import checksum
from tests.support.adapters import move_adapter
from tests.support.fake_server import FakeServer, Quirks
from tests.support.served import served

HALF = torch.bfloat16


@pytest.fixture
def adapted(folder: Path) -> Policy:
    """The model of `folder` in bfloat16, with an adapter that has left zero."""
    found = policies.load(folder, torch.device("cpu"), "bfloat16")
    lora.add(found.model, LoraConfig(rank=4, alpha=6), 0)
    move_adapter(found)
    return found


def step(policy: Policy, lr: float, seed: int, only: str = ".lora_") -> None:
    """Move every weight of the adapter by `lr`, up or down, as AdamW's first step does."""
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if only in name:
                parameter.add_(lr * (torch.randint(0, 2, parameter.shape, generator=chance) * 2 - 1))


def test_small_steps_raise_no_alarm(adapted: Policy, folder: Path) -> None:
    with FakeServer("vllm", folder, dtype=HALF) as server, served(adapted, server, sync="lora") as generators:
        generator = generators.training()
        for version in range(12):
            generator.sync(version)
            step(adapted, (1e-6, 1e-5, 2e-5)[version % 3], version)
        assert server.requests["/v1/load_lora_adapter"] == 12  # none a second time
        assert server.requests["/collective_rpc"] == 13  # the base model is summed once


PLANTED = {"all old": Quirks(keeps_old_adapter=True), "one block old": Quirks(keeps_tensors="model.layers.1.")}


@pytest.mark.parametrize("lr", [1e-6, 2e-5])
@pytest.mark.parametrize("name", PLANTED)
def test_an_old_adapter_is_caught_at_that_load(adapted: Policy, folder: Path, name: str, lr: float) -> None:
    with FakeServer("vllm", folder, dtype=HALF) as server, served(adapted, server, sync="lora") as generators:
        generator = generators.training()
        generator.sync(0)
        step(adapted, lr, 0)
        server.quirks = PLANTED[name]
        with pytest.raises(ServerFailed, match=r"given new weights, but \d+ of its adapter's \d+ tensors are not what"):
            generator.sync(1)
        server.quirks = Quirks()
        step(adapted, lr, 1)
        generator.sync(2)


def test_without_the_extension_the_scores_prove_it(adapted: Policy, folder: Path) -> None:
    plain = FakeServer("vllm", folder, quirks=Quirks(without_extension=True), dtype=HALF)
    with plain as server, served(adapted, server, sync="lora") as generators:
        generator = generators.training()
        generator.sync(0)
        step(adapted, 1e-2, 0)
        server.quirks.keeps_old_adapter = True
        with pytest.raises(ServerFailed, match="log-probabilities of fixed tokens"):
            generator.sync(1)


def test_another_runs_adapter_does_no_harm(adapted: Policy, folder: Path, tmp_path: Path) -> None:
    adapted.save(tmp_path / "other")
    with FakeServer("vllm", folder, dtype=HALF) as server, served(adapted, server, sync="lora") as generators:
        server.take_adapter("other", tmp_path / "other")
        for version in range(2):
            step(adapted, 1e-5, version)
            generators.training().sync(version)
        assert set(server.adapters) > {"other"}


def test_another_base_model_is_caught(adapted: Policy, folder: Path) -> None:
    """It differs by one step, which the scores do not show."""
    with FakeServer("vllm", folder, dtype=HALF) as server, served(adapted, server, sync="lora") as generators:
        step(adapted, 2e-5, 0, only=".layers.1.mlp.up_proj.base_layer.")
        with pytest.raises(ServerFailed, match=r"1 of its base model's \d+ tensors are not the trainer's: .*gate_up"):
            generators.training().sync(0)


def test_layers_that_are_scaled_differently_are_not_compared(
    adapted: Policy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapted.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    sums = WeightSums({"model.layers.0.self_attn.q_proj.lora_A.weight": TensorSum(1, "float32", 0, 1)}, {}, "float32")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {"q_proj": 1}}))
    assert Comparison(adapted.device).wrong_adapter(tmp_path, sums) is None
    assert "scaled differently" in caplog.text


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_b_is_rounded_before_and_after_it_is_scaled(adapted: Policy, tmp_path: Path, rank_stabilised: bool) -> None:
    adapted.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": rank_stabilised}))
    scaling = 6 / 2 if rank_stabilised else 6 / 4
    tensors = {}
    for name, weight in adapted.model.state_dict().items():
        if ".lora_" in name:
            taken = weight.to(HALF)
            taken = (taken.float() * scaling).to(HALF) if ".lora_B." in name else taken
            tensors[name.replace(".default.", ".")] = TensorSum(checksum(taken), "bfloat16", 0, 1)
    comparison = Comparison(adapted.device)
    assert comparison.wrong_adapter(tmp_path, WeightSums(tensors, {}, "bfloat16")) == []
    odd = {"lm_head.lora_B.weight": TensorSum(1, "bfloat16", 0, 1)}  # left by another adapter
    assert comparison.wrong_adapter(tmp_path, WeightSums(tensors | odd, {}, "bfloat16")) == list(odd)
    name = min(tensors)
    fewer = {other: found for other, found in tensors.items() if other != name}
    assert comparison.wrong_adapter(tmp_path, WeightSums(fewer, {}, "bfloat16")) is None
