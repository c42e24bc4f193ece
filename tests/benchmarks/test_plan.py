"""The planner's formulas, against models that are built and operations that are counted elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from benchmarks.plan import GSM8K, H100, QWEN, Machine, forward_flops, plan, tables
from grpo_mlflow.model.memory import Shape, Workload
from grpo_mlflow.training.throughput import Costs
from tests.support.groups import make_groups
from tests.support.paths import ROOT

LLAMA = Shape("llama", 32, 3, 4, 2, 8, 96, 100, tied=True, biased=False)
QWEN2 = Shape("qwen2", 32, 2, 4, 4, 8, 64, 100, tied=False, biased=True)


def build(shape: Shape) -> torch.nn.Module:
    settings = {
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.inner,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.tied,
    }
    if shape.biased:
        return Qwen2ForCausalLM(Qwen2Config(**settings))  # type: ignore[no-any-return]
    return LlamaForCausalLM(LlamaConfig(**settings))  # type: ignore[no-any-return]


@pytest.mark.parametrize("shape", [LLAMA, QWEN2], ids=lambda shape: shape.name)
def test_weights_are_counted_as_the_model_has_them(shape: Shape) -> None:
    model = build(shape)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert Costs.of(model).token == 2 * shape.body


def test_the_models_of_the_table_have_the_sizes_that_their_makers_give() -> None:
    assert [round(shape.parameters / 1e9, 2) for shape in QWEN] == [0.49, 1.54, 7.62]


def test_operations_are_those_that_the_run_counts() -> None:
    """On groups of equal lengths both are the same sum."""
    work = Workload(problems=2, k=4, prompt=7, completion=5, rows=4)
    groups = []
    for group in make_groups(2):
        prompt = replace(group.rollouts[0].prompt, token_ids=(6,) * 7)
        like = replace(group.rollouts[0].completion, behaviour_logprobs=(0.0,) * 5)
        completions = [replace(like, token_ids=(6, 6, 6, 6, j)) for j in range(4)]
        rollouts = [replace(group.rollouts[0], prompt=prompt, completion=completion) for completion in completions]
        groups.append(replace(group, rollouts=tuple(rollouts)))
    assert forward_flops(LLAMA, work) == pytest.approx(Costs.of(build(LLAMA)).forward(groups))


def test_memory_is_the_sum_of_its_parts() -> None:
    """By hand: N weights at 4 + 4 + 8 bytes, 4 for the reference, 2 for the copies, 4 for the buckets of DDP."""
    number = LLAMA.parameters
    alone, among = (plan(LLAMA, GSM8K, H100, count).training for count in (1, 8))
    fixed = ("weights", "gradients", "optimizer state", "reference", "bfloat16 copies")
    assert sum(alone[name] for name in fixed) == 22 * number
    assert (alone["buckets of DDP"], among["buckets of DDP"]) == (0, 4 * number)
    full = plan(LLAMA, replace(GSM8K, bfloat16=False, reference=False), H100).training
    assert full["activations"] == 2 * alone["activations"]
    assert full["reference"] == full["bfloat16 copies"] == 0
    assert plan(LLAMA, replace(GSM8K, checkpointing=True), H100).training["activations"] < alone["activations"] / 2


def test_time_follows_operations_and_bandwidth() -> None:
    slow = Machine("slow", flops=1e9, bandwidth=1e30, share=0.5)
    found = plan(QWEN2, GSM8K, slow)
    assert found.update_flops == 4 * found.generate_flops
    assert found.generate_seconds == pytest.approx(found.generate_flops / 0.5e9)
    assert plan(QWEN2, GSM8K, slow, 8).update_seconds == pytest.approx(found.update_seconds / 8)
    starved = plan(QWEN2, GSM8K, replace(slow, flops=1e30, bandwidth=1e9))
    assert starved.generate_seconds > GSM8K.completion * 2 * QWEN2.parameters / 0.5e9  # all weights, for each token


def test_the_tables_of_the_docs_are_the_planners() -> None:

    text = (ROOT / "docs/scaling.md").read_text()
    assert all(line in text for line in tables().splitlines())
