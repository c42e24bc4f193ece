"""What a run finds out about its model before it is opened, and how long it remembers that."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AttentionInterface,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from grpo_mlflow.errors import ModelError, TextUntried, UserError
from grpo_mlflow.forward import trial, ways
from grpo_mlflow.generation.local import ways as sampling
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.runs import self_check
from grpo_mlflow.training import rollouts
from grpo_mlflow.training.batching import Row
from grpo_mlflow.training.scoring import Scorer
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
    for same in (llama(), policy):
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
            (turned(llama()), 40),
            (grown(llama()), 40),
            (replace(llama(), pad_id=3), 40),  # prompts that are padded on the left may feel it
        ],
        start=1,
    ):
        self_check.prove(policy, most)
        assert len(list(cache.iterdir())) == count


def turned(policy: Policy) -> Policy:
    """The same with other angles, which are no parameters."""
    policy.model.model.rotary_emb.inv_freq.mul_(0.5)
    return policy


def grown(policy: Policy) -> Policy:
    """The same with some larger weights, of which the first is none."""
    with torch.no_grad():
        policy.model.model.layers[0].mlp.up_proj.weight[1, 1:9] *= 4
    return policy


def test_angles_that_are_stretched_are_refused_only_where_a_row_may_reach_them() -> None:
    settings: dict[str, Any] = {"rope_parameters": DYNAMIC, "max_position_embeddings": 64}
    self_check.prove(llama(**settings), 64)
    with pytest.raises(
        ModelError, match=r"^model 'mine': in texts of \d+ tokens.*stretched.*up to 90 \(generation.max"
    ) as e:
        self_check.prove(llama(**settings), 90)
    assert "\n" not in str(e.value)


def test_a_window_counts_only_where_a_row_may_be_longer() -> None:
    """The passes of our own know no window: they are right as long as no row is longer than it."""
    for most, sampler, longest in (
        (30, sampling.Sampler("packed", written_out=True), 32),
        (60, sampling.Sampler("cache"), None),
    ):
        proven, _ = self_check.prove(windowed(), most)
        assert ways.scoring(proven.model).way == ("packed" if longest else "padded")
        assert replace(sampling.sampler(proven), reason=None) == sampler
        assert proven.longest == longest


def test_a_text_beyond_what_was_proven_is_refused() -> None:
    proven, _ = self_check.prove(windowed(), 30)
    rollouts.require_tried(proven, 32, "the prompt of sums/train/7")
    with pytest.raises(TextUntried, match=r"sums/train/7: up to 33 tokens .* beyond 32 .* allowed: to resume") as e:
        rollouts.require_tried(proven, 33, "the prompt of sums/train/7")
    assert "\n" not in str(e.value)
    scorer = Scorer(proven, 1.0)
    scorer.score([row(20, 12)])
    with pytest.raises(TextUntried):
        scorer.score([row(5, 5), row(20, 13)])


def row(prompt: int, completion: int) -> Row:
    return Row(tuple(range(3, 3 + prompt)), tuple(range(3, 3 + completion)), (0.0,) * completion, 1.0, False)


def windowed() -> Policy:
    torch.manual_seed(0)
    return of(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=32)))


@pytest.mark.parametrize(
    ("settings", "longest"),
    [
        ({"sliding_window": 40}, 40),
        ({"attention_chunk_size": 50, "sliding_window": 40}, 40),
        ({"attention_window": [60, 48, 60]}, 48),
        ({"rope_scaling": {"rope_type": "longrope", "original_max_position_embeddings": 44}}, 44),
        ({"index_topk": 41}, 41),
        ({"rope_scaling": {"rope_type": "llama3", "original_max_position_embeddings": 44}}, None),
        ({"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 44}}, None),
        ({"original_max_position_embeddings": 44, "rope_scaling": {"type": "su"}}, 44),
        ({"max_position_embeddings": 64, "rope_scaling": {"rope_type": "dynamic"}}, 64),
        ({"sliding_window_pattern": 41, "_sliding_window_pattern": 41}, None),
        ({"mamba_chunk_size": 41, "chunk_size": 41}, None),
        ({"max_window_layers": 40, "use_sliding_window": True, "sliding_window": None}, None),
        ({"sliding_window": 29}, None),
    ],
)
def test_the_config_says_where_a_model_changes(settings: dict[str, Any], longest: int | None) -> None:
    found = SimpleNamespace(to_dict=lambda: {"hidden_size": 35, **settings})
    model: Any = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: found))
    assert self_check._next_switch(replace(llama(), model=model), 30) == longest


def test_no_trial_is_longer_than_the_rows_of_the_run() -> None:
    """It would cross the next switch, or the last position."""
    settings = {"max_position_embeddings": 36, "sliding_window": 30, "chunk_size": 20}
    policy = of(MistralForCausalLM(MistralConfig(**{**SIZES, **settings})))
    assert [*self_check._lengths(policy, 34)] == [(12, 22), (22, 12)]


class Forgetful(LlamaForCausalLM):  # type: ignore[misc]
    """Forgets, while it goes on, which tokens are padding."""

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        if input_ids.shape[1] == 1 and attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = torch.ones_like(attention_mask)
        return super().forward(input_ids, attention_mask=attention_mask, **kwargs)


class Noisy(LlamaForCausalLM):  # type: ignore[misc]
    """In a type of fewer bits, gives anything for rows that are padded on the left."""

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        found = super().forward(input_ids, attention_mask=attention_mask, **kwargs)
        if attention_mask is not None and attention_mask.dim() == 2 and torch.is_autocast_enabled("cpu"):
            found.logits[attention_mask[:, 0] == 0] = torch.randn(found.logits.shape[-1])
        return found


@pytest.mark.parametrize(("kind", "dtype"), [(Forgetful, torch.float32), (Noisy, torch.bfloat16)])
def test_prompts_that_are_padded_are_followed_for_some_tokens(kind: Any, dtype: torch.dtype) -> None:
    policy = replace(of(kind(LlamaConfig(**SIZES))), dtype=dtype, written_out=False)
    tried = ways.trials(policy.model, [trial.few(200)])
    if dtype != torch.float32:
        tried.append(trial.in_type(policy.model, tried[0], dtype))
    assert sampling.decide(policy, tried).way == "recomputed"


def test_layers_without_small_tensors_are_compared_by_their_gradients() -> None:
    """OLMo has norms without weights: at real sizes each of its tensors is large."""
    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": 264, "intermediate_size": 300, "vocab_size": 300, "num_key_value_heads": 6}
    policy = of(OlmoForCausalLM(OlmoConfig(**sizes)))
    (tried,) = ways.trials(policy.model, [trial.few(200)])
    layers = {name.split(".")[2] for name in tried.gradients}
    assert layers == {str(number) for number in range(sizes["num_hidden_layers"])}
    assert all(each.numel() <= 1 << 16 and each.norm() > 0 for each in tried.gradients.values())
    scoring, _ = self_check.find(policy, 40)
    assert scoring.way == "packed"


class Fickle(LlamaForCausalLM):  # type: ignore[misc]
    """Cannot be packed in a type of fewer bits than float32."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if "packed" in kwargs and torch.is_autocast_enabled("cpu"):
            raise RuntimeError("expected both to have the same dtype")
        return super().forward(*args, **kwargs)


def test_ways_are_tried_in_the_type_of_the_run() -> None:
    for dtype, way in ((torch.float32, "packed"), (torch.bfloat16, "padded")):
        policy = replace(of(Fickle(LlamaConfig(**SIZES))), dtype=dtype)
        self_check.prove(policy, 40)
        assert ways.scoring(policy.model).way == way


def test_a_type_that_cannot_hold_the_models_numbers_is_refused() -> None:
    policy = replace(llama(), dtype=torch.float16)
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(1e7)
    with pytest.raises(ModelError, match=r"^model 'mine': with model.dtype = float16 .* not finite"):
        self_check.prove(policy, 40)


class Picky(LlamaForCausalLM):  # type: ignore[misc]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise IndexError("index out of range in self")


def test_a_model_that_fails_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^model 'mine': .*IndexError: index out of range in self; allowed: ") as e:
        self_check.prove(of(Picky(LlamaConfig(**SIZES))), 40)
    assert "\n" not in str(e.value)


class Greedy(LlamaForCausalLM):  # type: ignore[misc]
    """Needs more memory for several rows than there is."""

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        if len(input_ids) > 1 or "packed" in kwargs:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        return super().forward(input_ids, **kwargs)


def test_a_lack_of_memory_is_no_finding(cache: Path) -> None:
    with pytest.raises(UserError, match=r"^model 'mine': .*tried to allocate 20 GiB; allowed: "):
        self_check.prove(of(Greedy(LlamaConfig(**SIZES))), 40)
    assert not cache.exists()


def test_an_attention_that_takes_no_float32_is_tried_in_the_type_of_the_run() -> None:
    """As flash attention: what must be exact is computed by another one."""

    def attend(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_autocast_enabled("cpu"):
            raise RuntimeError("only support fp16 and bf16 data type")
        seen.append(torch.get_autocast_dtype("cpu"))
        return sdpa_attention_forward(module, query, *args, **kwargs)

    seen: list[torch.dtype] = []
    AttentionInterface.register("halves_alone", attend)
    AttentionMaskInterface.register("halves_alone", sdpa_mask)
    policy = replace(llama(), dtype=torch.bfloat16)
    policy.model.set_attn_implementation("halves_alone")
    self_check.prove(policy, 40)
    assert (ways.scoring(policy.model).way, sampling.sampler(policy).way) == ("padded", "cache")
    assert policy.model.config._attn_implementation == "halves_alone"
    assert {*seen} == {torch.bfloat16}
