"""The formulas of memory, against bytes counted on small models and their optimizers."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from grpo_mlflow.config import Config, LoraConfig, TrainConfig, resolve
from grpo_mlflow.errors import ModelError
from grpo_mlflow.forward import tuning
from grpo_mlflow.forward.token_head import token_logprobs
from grpo_mlflow.model import loading, lora, memory, policy, tiny
from grpo_mlflow.model.memory import Shape, Workload
from grpo_mlflow.model.policy import FLOAT32, Policy, Stored
from grpo_mlflow.runs import plan
from grpo_mlflow.runs.doctor import Doctor, _of_weights
from grpo_mlflow.runs.server_checks import Trouble
from grpo_mlflow.training import optimizers
from tests.support.packed_rows import build

CPU = torch.device("cpu")
WORK = Workload(problems=4, k=4, prompt=10, completion=20, rows=4, reference=False, bfloat16=False)


def bytes_of(tensors: Any) -> int:
    return sum(memory.held(each) for each in tensors)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of the family, each with the tokenizer of the embedded one."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_attention_heads": 4, "vocab_size": 400}
    found = {}
    for name in ("qwen2", "llama", "qwen3"):
        like = build(name)
        model = type(like)(type(like.config)(**{**like.config.to_dict(), **sizes}))
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
        tiny.make_tokenizer().save_pretrained(found[name])
    return found


@pytest.mark.parametrize("name", ["qwen2", "llama", "qwen3"])
@pytest.mark.parametrize("stored", [FLOAT32, Stored(torch.bfloat16), Stored(torch.bfloat16, in_4_bits=True)])
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "down_proj")])
def test_parts_of_an_adapter_are_those_of_the_model(
    folders: dict[str, Path], name: str, stored: Stored, targets: Any
) -> None:
    model = policy.load(folders[name], CPU, stored=stored).model
    lora.add(model, LoraConfig(rank=4, targets=targets), 0)
    work = replace(WORK, rank=4, targets=targets, low_base=stored.dtype == torch.bfloat16, nf4=stored.in_4_bits)
    parts = memory.training(Shape.read(folders[name]), work)
    assert parts["frozen base"] == bytes_of(p for p in model.parameters() if not p.requires_grad)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert parts["weights"] == parts["gradients"] == bytes_of(trained)
    assert parts["reference"] == 0


@pytest.mark.parametrize("rank", [0, 64])
@pytest.mark.parametrize("name", ["adamw", "sgd", "adamw8bit"])
def test_states_are_those_of_the_optimizer(folders: dict[str, Path], name: str, rank: int) -> None:
    model = policy.load(folders["qwen2"], CPU).model
    if rank:
        lora.add(model, LoraConfig(rank=rank), 0)
    trained = [p for p in model.parameters() if p.requires_grad]
    found = optimizers.create(trained, TrainConfig(optimizer=name))
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    found.step()
    # by storage: tensors of 8 bits share what their codes mean
    held = {
        value.untyped_storage().data_ptr(): value.nbytes
        for state in found.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.ndim
    }
    expected = memory.state(Shape.read(folders["qwen2"]), replace(WORK, optimizer=name, rank=rank))
    assert sum(held.values()) == pytest.approx(expected, rel=0.01)


def test_an_offloaded_state_moves_to_the_host() -> None:
    shape = Shape("x", 32, 2, 4, 2, 8, 96, 100, tied=True, biased=False)
    work = replace(WORK, offload=True)
    parts, host = memory.training(shape, work), memory.host(shape, work)
    assert parts["optimizer state"] == 0
    assert host["optimizer state"] == memory.training(shape, WORK)["optimizer state"] == 8 * shape.parameters
    assert memory.host(shape, WORK) == {}


def test_a_reference_on_the_cpu_is_whole_in_each_process() -> None:
    shape = Shape("x", 32, 2, 4, 2, 8, 96, 100, tied=True, biased=False)
    work = replace(WORK, reference=True, reference_device="cpu", sharded=True)
    assert memory.training(shape, work, 2)["reference"] == 0
    assert memory.host(shape, work, 2) == {"reference": 2 * 4 * shape.parameters}
    elsewhere = replace(work, reference_device="cuda:7")
    assert memory.training(shape, elsewhere, 2)["reference"] == 4 * shape.parameters
    assert memory.host(shape, elsewhere, 2) == {}


def test_sharding_divides_what_it_splits() -> None:
    shape = Shape("x", 32, 2, 4, 2, 8, 96, 100, tied=True, biased=False)
    alone = memory.training(shape, replace(WORK, reference=True))
    among = memory.training(shape, replace(WORK, reference=True, sharded=True), 4)
    for name in ("weights", "gradients", "optimizer state", "reference"):
        assert among[name] == alone[name] / 4
    assert among["gathered layers"] == 2 * 4 * max(shape.body / 2, 100 * 32)
    assert among["buckets of DDP"] == 0
    assert among["activations"] == alone["activations"]


@pytest.mark.parametrize("tokens", [64, 1024, 4096])  # a slice, a few that are kept, more than are kept
def test_logits_take_what_the_output_layer_allocates(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    width, vocabulary = 4, 512
    monkeypatch.setattr(tuning, "LOGITS_SLICE", 256 * vocabulary)
    monkeypatch.setattr(tuning, "KEPT_LOGPROBS", 1024 * vocabulary)
    hidden, weight = torch.randn(tokens, width), torch.randn(vocabulary, width)
    targets = torch.randint(vocabulary, (tokens,))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        token_logprobs(hidden.requires_grad_(), weight.requires_grad_(), None, targets, 1.0)[0].sum().backward()
    taken = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = accumulate(event.nbytes() for event in sorted(taken, key=lambda event: event.start_ns()))
    shape = Shape("", width, 1, 1, 1, width, width, vocabulary, True, False)
    parts = memory.training(shape, replace(WORK, rows=1, completion=tokens))
    small = 2 * parts["output layer"] + 4 * tokens * (2 * width + 4)  # of weights and hidden states
    assert parts["logits"] <= max(held) <= parts["logits"] + small


def test_an_output_layer_in_float32_is_gathered_in_it() -> None:
    shape = Shape("x", 32, 2, 4, 2, 8, 96, 1000, tied=True, biased=False)
    work = replace(WORK, bfloat16=True, sharded=True)
    for head, size in ((False, 2), (True, 4)):
        assert memory.training(shape, replace(work, float32_head=head), 2)["gathered layers"] == 2 * size * 1000 * 32


def test_a_shape_is_read_without_weights(tmp_path: Path, folders: dict[str, Path]) -> None:
    (tmp_path / "config.json").write_text((folders["qwen3"] / "config.json").read_text())
    found = policy.load(folders["qwen3"], CPU).model
    assert Shape.read(tmp_path).parameters == sum(p.numel() for p in found.parameters())
    with pytest.raises(ModelError, match=r"no config\.json; allowed: a model folder, or a cached hub id"):
        Shape.read(tmp_path / "nothing")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_embd": 4}')
    with pytest.raises(ModelError, match="describes no model of the Llama family"):
        Shape.read(tmp_path)


# What makes a run fit


def test_settings_are_named_until_it_fits() -> None:
    shape = Shape("x", 512, 8, 8, 8, 64, 2048, 1000, tied=True, biased=False)
    work = replace(WORK, reference=True)

    def size(changed: Workload) -> float:
        return sum(memory.training(shape, changed).values())

    assert plan.to_fit(work, size, size(work)) == ([], True)
    chosen, fits = plan.to_fit(work, size, 0.75 * size(work))
    assert fits
    assert chosen[-1] == "train.optimizer=adamw8bit"
    everything, fits = plan.to_fit(work, size, 1.0)
    assert not fits
    assert everything[-2:] == ["model.lora.rank=16", "model.quantization=nf4"]


@pytest.mark.parametrize(("words", "change"), plan.STEPS, ids=lambda each: each if isinstance(each, str) else "")
def test_every_setting_that_is_named_does_what_is_computed(words: str, change: plan.Change) -> None:
    base = ["train.kl_coef=0.1", *(["model.lora.rank=16"] if "nf4" in words else [])]
    before, after = (plan.workload(resolve("tiny", each).config, 10) for each in (base, [*base, *words.split()]))
    assert change(before) == after
    assert change(after) is None


def test_limits_in_tokens_bound_what_is_held_at_once() -> None:
    sizes = ["train.batch_size=64", "generation.max_new_tokens=100", "data.rollouts_per_problem=8"]
    config = resolve("tiny", [*sizes, "train.max_tokens_per_batch=500", "generation.max_tokens_per_batch=240"]).config
    work = plan.workload(config, 20)
    assert work.rows == 4  # a prompt of 20 tokens, and four completions
    shape = Shape("x", 32, 2, 4, 2, 8, 96, 100, tied=True, biased=False)
    assert plan.need(shape, work, config).cache == 4 * shape.kv_per_token * 240
    assert plan.workload(resolve("tiny", [*sizes, "train.max_tokens_per_batch=50"]).config, 20).rows == 1


def test_the_plan_in_shards_is_that_of_one_process_of_many() -> None:
    """Alone, a process shares nothing out; among four it holds a quarter, and while it samples all weights at once."""
    shape = Shape("x", 32, 2, 4, 2, 8, 96, 100, tied=True, biased=False)
    words = ["train.sharding=full", "generation.backend=local"]
    config, plain = resolve("tiny", words).config, resolve("tiny").config

    def need(config: Config, processes: int) -> plan.Need:
        return plan.need(shape, plan.workload(config, 10, processes), config, processes)

    assert need(config, 1) == need(plain, 1)
    among, alone = need(config, 4), need(config, 1)
    for name in ("weights", "gradients", "optimizer state"):
        assert among.device[name] == alone.device[name] / 4
        assert need(plain, 4).device[name] == alone.device[name]
    assert among.cache == alone.cache + 4 * shape.parameters


def test_a_plan_in_shards_names_only_settings_that_shards_take() -> None:
    shape = Shape("x", 512, 8, 8, 8, 64, 2048, 1000, tied=True, biased=False)
    words = ["train.sharding=full", "train.kl_coef=0.1"]
    work = plan.workload(resolve("tiny", words).config, 10, 4)
    chosen, fits = plan.to_fit(work, lambda changed: sum(memory.training(shape, changed, 4).values()), 1.0)
    assert not fits
    assert "model.lora.rank=16" in chosen
    resolve("tiny", [*words, *" ".join(chosen).split()])  # nothing is refused


def test_on_a_cpu_doctor_counts_all_that_a_process_holds_alone(tmp_path: Path) -> None:
    """All processes there would share the memory that it looks at, so shards save nothing."""
    configs = [resolve("tiny", ["model.tiny.steps=1", f"train.sharding={each}"]).config for each in ("none", "full")]
    actor = loading.trained(configs[0], loading.model_source("tiny", configs[0]), CPU)
    whole, sharded = (Doctor(config, tmp_path)._memory(actor).partition("GiB by part")[2] for config in configs)
    assert whole == sharded != ""


def test_doctor_prints_each_part_and_what_would_make_it_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = resolve("tiny", ["model.tiny.steps=1", "train.kl_coef=0.1"]).config
    actor = loading.trained(config, loading.model_source("tiny", config), CPU)
    doctor = Doctor(config, tmp_path)
    found = doctor._memory(actor)
    for name in ("weights", "gradients", "optimizer state", "reference", "activations", "logits", "sampling"):
        assert f"{name} " in found
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1.0))
    with pytest.raises(Trouble, match="needed at least") as caught:
        doctor._memory(actor)
    assert "model.lora.rank=16" in caught.value.remedy


def test_doctor_counts_the_weights_of_what_it_has_no_formula_for(tmp_path: Path) -> None:
    config = resolve("tiny", ["train.kl_coef=0.1"]).config
    model = build("gpt2")
    actor = Policy(model, None, CPU, torch.float32, (2,), 0)
    assert "GiB by part" not in Doctor(config, tmp_path)._memory(actor)
    # weights, gradient, two moments, reference
    assert _of_weights(config, actor) == 20 * sum(p.numel() for p in model.parameters())
