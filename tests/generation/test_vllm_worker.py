"""What a vLLM worker learns from us, on stand-ins for the parts of vLLM that it uses."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_mlflow.serverside.grpo_vllm_worker import WeightLoader, checksum, mend_adapters


class Mapping:
    """Which adapter each token has, and each row that is sampled from."""

    def __init__(self, tokens: Sequence[int], sampled: Sequence[int], is_prefill: bool) -> None:
        self.tokens, self.sampled = tokens, sampled


class Wrapper:
    """Adds adapters to the rows of a batch, as vLLM 0.32 does on a CPU."""

    no_lora = False

    def __init__(self, tokens: int, requests: int, device: torch.device) -> None:
        pass

    def update_metadata(self, mapping: Mapping, ids: list[int | None], slots: int, vocabulary: int) -> None:
        self.token_lora_indices, self.sampler_indices = (
            torch.tensor([ids.index(each) if each else -1 for each in given])
            for given in (mapping.tokens, mapping.sampled)
        )

    def _apply_shrink(self, y: Tensor, x: Tensor, w_t_all: Tensor, scale: float) -> None:
        y += scale * torch.einsum("ti,tri->tr", x, w_t_all[self.token_lora_indices, 0])

    def add_lora_linear(
        self, y: Tensor, x: Tensor, a: tuple[Tensor], b: tuple[Tensor], scale: float, slices: tuple[int]
    ) -> None:
        inner = torch.zeros(len(x), a[0].shape[2])
        self._apply_shrink(inner, x, a[0], scale)
        y += torch.einsum("tr,tor->to", inner, b[0][self.token_lora_indices, 0])

    def add_lora_logits(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, **_: object) -> None:
        inner = scale * torch.einsum("ti,tri->tr", x, a[self.sampler_indices, 0])
        y += torch.einsum("tr,tor->to", inner, b[self.sampler_indices, 0])


class Newer(Wrapper):
    """As a version would that has no such gaps."""

    def _apply_shrink(self, y: Tensor, x: Tensor, w_t_all: Tensor, scale: float) -> None:
        super()._apply_shrink(y, x, w_t_all, scale)
        y[self.token_lora_indices < 0] = 0

    def add_lora_logits(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, **_: object) -> None:
        if b.any():
            super().add_lora_logits(y, x, a, b, scale)


@pytest.fixture
def mended() -> type[Wrapper]:
    class Mended(Wrapper):
        pass

    assert mend_adapters(Mended, Mapping) == ["requests without an adapter", "scores of prompts"]
    return Mended


def batch(kind: type[Wrapper], adapters: Sequence[int]) -> Wrapper:
    """A batch of one token for each request, with adapter 7 in the first of two slots and 9 in the last."""
    made = kind(8, 8, torch.device("cpu"))
    made.update_metadata(Mapping(adapters, adapters, True), [7, 9], 3, 5)
    return made


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_a_request_without_an_adapter_gets_none_beside_one_with(mended: type[Wrapper]) -> None:
    a, b, x = random(2, 1, 3, 4), random(2, 1, 5, 3), random(4, 4)
    added = torch.zeros(4, 5)
    batch(mended, (9, 0, 7, 0)).add_lora_linear(added, x, (a,), (b,), 1.0, (5,))
    slots = (1, None, 0, None)
    wanted = [
        torch.zeros(5) if slot is None else b[slot, 0] @ a[slot, 0] @ row for slot, row in zip(slots, x, strict=True)
    ]
    assert torch.allclose(added, torch.stack(wanted), atol=1e-5)


def test_a_prompt_is_scored_beside_other_requests(mended: type[Wrapper]) -> None:
    a, nothing, logits = random(2, 1, 3, 4), torch.zeros(2, 1, 5, 3), random(6, 5)
    before = logits.clone()
    batch(mended, (7, 9)).add_lora_logits(logits, random(6, 4), a, nothing, 1.0)
    assert torch.equal(logits, before)


def test_an_adapter_of_the_output_layer_is_added_as_before(mended: type[Wrapper]) -> None:
    a, b, x = random(2, 1, 3, 4), random(2, 1, 5, 3), random(2, 4)
    found, wanted = torch.zeros(2, 5), torch.zeros(2, 5)
    batch(mended, (7, 9)).add_lora_logits(found, x, a, b, 1.0)
    batch(Wrapper, (7, 9)).add_lora_logits(wanted, x, a, b, 1.0)
    assert torch.equal(found, wanted)
    assert found.abs().min() > 0
    with pytest.raises(RuntimeError):  # not silently left out
        batch(mended, (7, 9)).add_lora_logits(torch.zeros(6, 5), random(6, 4), a, b, 1.0)


def test_a_version_without_the_gaps_is_left_alone() -> None:
    methods = dict(vars(Newer))
    assert mend_adapters(Newer, Mapping) == []
    assert dict(vars(Newer)) == methods


class Worker(WeightLoader):
    """A worker with a manager of adapters whose stacks have a slot more than adapters, and room for rank 4."""

    def __init__(self, modules: dict[str, Any], packed: dict[str, list[str]]) -> None:
        manager = SimpleNamespace(
            modules=modules,
            packed_modules=packed,
            lora_index_to_id=[None, 5],
            lora_slots=2,
            lora_config=SimpleNamespace(lora_dtype=torch.bfloat16),
        )
        self.model_runner = SimpleNamespace(lora_manager=SimpleNamespace(_adapter_manager=manager))


def layer(a: Sequence[Tensor], b: Sequence[Tensor]) -> SimpleNamespace:
    """A layer whose second slot holds an adapter, each slice filled up to rank 4; the first holds an older one."""
    stacks: dict[str, list[Tensor]] = {"a": [], "b": []}
    for one, other in zip(a, b, strict=True):
        stacks["a"].append(torch.ones(2, 1, 4, one.shape[1]))
        stacks["b"].append(torch.ones(2, 1, len(other), 4))
        stacks["a"][-1][1], stacks["b"][-1][1] = 0, 0
        stacks["a"][-1][1, 0, : len(one)] = one
        stacks["b"][-1][1, 0, :, : other.shape[1]] = other
    return SimpleNamespace(lora_a_stacked=tuple(stacks["a"]), lora_b_stacked=tuple(stacks["b"]))


def test_adapters_are_summed_where_they_are_computed_with() -> None:
    a, b = [random(3, 8), random(3, 9)[:, :8], random(3, 10)[:, :8]], [random(6, 3), random(2, 3), random(2, 4)[:, :3]]
    packed = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    told = Worker({"qkv_proj": layer(a, b), "o_proj": layer(a[:1], b[:1])}, packed).grpo_adapter_checksums()
    assert told["dtype"] == "bfloat16"
    (found,) = told["adapters"]  # of the slot in use
    wanted = {}
    for name, place in (("q_proj", 0), ("k_proj", 1), ("v_proj", 2), ("o_proj", 0)):
        wanted[f"{name}.lora_A.weight"] = [checksum(a[place]), "float32", 0, 1]
        wanted[f"{name}.lora_B.weight"] = [checksum(b[place]), "float32", 0, 1]
    assert found == wanted


def test_an_unknown_layout_and_no_adapters_at_all_are_said() -> None:
    odd = Worker({"experts": layer([random(3, 8)], [random(6, 3)])}, {"experts": ["w1", "w2"]})
    assert odd.grpo_adapter_checksums() == {"error": "ValueError: experts keeps adapters in a layout of its own"}
    odd.model_runner = SimpleNamespace()
    assert "lora_manager" in odd.grpo_adapter_checksums()["error"]
