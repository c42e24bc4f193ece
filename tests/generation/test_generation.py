"""Sampling: the drawn tokens follow the processed distribution, and the reported log-probs are those of that."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from grpo_mlflow import seeding
from grpo_mlflow.forward import kv_cache, tuning
from grpo_mlflow.forward.llama_step import LlamaStep
from grpo_mlflow.forward.prefix_tree import common_prefix
from grpo_mlflow.generation import LocalGenerator, Sampling
from grpo_mlflow.generation.local import decoding, ways
from grpo_mlflow.generation.sampling import draw, processed_logprobs
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.tasks import Arithmetic, Sat
from grpo_mlflow.training.batching import Row
from grpo_mlflow.training.scoring import Scorer
from grpo_mlflow.types import Completion, Prompt


def prompts(policy: Policy) -> list[Prompt]:
    """Prompts of very different lengths."""
    return [
        policy.prompt(Arithmetic().problem("train", 1)),
        policy.prompt(Sat().problem("train", 2)),
        policy.prompt(Arithmetic(terms=4).problem("train", 3)),
    ]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1, temperature=0.7),
        Sampling(1, temperature=1.3, top_k=4),
        Sampling(1, temperature=1.0, top_p=0.8),
        Sampling(1, temperature=0.9, top_p=0.9, top_k=6, repetition_penalty=1.5),
    ],
)
def test_frequencies_follow_the_processed_distribution(sampling: Sampling) -> None:
    logits = torch.tensor([[2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, 0.2, 1.1]])
    seen = torch.zeros(1, 10, dtype=torch.bool)
    seen[0, [0, 6]] = True
    logprobs = processed_logprobs(logits, sampling, seen)
    count = 20_000
    uniforms = torch.from_numpy(seeding.stream(0, "chi-square").random(count))
    drawn = np.bincount(draw(logprobs.expand(count, -1), uniforms).numpy(), minlength=10)
    expected = logprobs.exp().numpy()[0] * count
    possible = expected > 0
    assert drawn[~possible].sum() == 0
    statistic = float(((drawn[possible] - expected[possible]) ** 2 / expected[possible]).sum())
    # the 99.9% quantiles of chi-square with 1 to 9 degrees of freedom
    quantiles = [10.83, 13.82, 16.27, 18.47, 20.52, 22.46, 24.32, 26.12, 27.88]
    assert statistic < quantiles[int(possible.sum()) - 2]


@pytest.mark.parametrize("top_k", [-1, 0, 5])
@pytest.mark.parametrize("top_p", [1.0, 0.75])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_processing_equals_that_of_transformers(top_k: int, top_p: float, penalty: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(6, 40, generator=generator)
    context = torch.randint(0, 40, (6, 9), generator=generator)
    seen = torch.zeros(6, 40, dtype=torch.bool).scatter(1, context, True)
    steps = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(0.8)])
    if top_k > 0:
        steps.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        steps.append(TopPLogitsWarper(top_p))
    expected = steps(context, logits.clone()).log_softmax(-1)
    found = processed_logprobs(logits, Sampling(1, 0.8, top_p, top_k, penalty), seen)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_an_excluded_token_is_never_drawn() -> None:
    logprobs = torch.tensor([[-torch.inf, -1.2, -0.5, -torch.inf]])  # rounded: they sum to less than 1
    assert logprobs.exp().sum() < 0.999
    drawn = [draw(logprobs, torch.tensor([u], dtype=torch.float64)).item() for u in (0.0, 0.5, 1.0 - 2**-53)]
    assert drawn == [1, 2, 2]


@pytest.mark.parametrize("vocabulary", [1, 10, 256, 257, 5000])
def test_draws_invert_the_cumulative_distribution(vocabulary: int) -> None:
    rows = 200
    logits = 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0))
    logprobs = logits.masked_fill(logits < -2, -torch.inf).double().log_softmax(-1)
    logprobs[logprobs.isnan().any(dim=1)] = -math.log(vocabulary)
    uniforms = torch.from_numpy(seeding.stream(0, "inverse").random(rows))
    cumulative = logprobs.exp().cumsum(dim=1)
    expected = (cumulative <= uniforms[:, None] * cumulative[:, -1:]).sum(dim=1)
    assert torch.equal(draw(logprobs, uniforms), expected)


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_greedy_equals_a_plain_loop(policy: Policy, penalty: float) -> None:
    sampling = Sampling(8, temperature=0.0, repetition_penalty=penalty)
    found = LocalGenerator(policy, batch_size=3).generate(prompts(policy), 1, sampling, 0, ())
    for prompt, row in zip(prompts(policy), found, strict=True):
        ids = list(prompt.token_ids)
        for _ in range(8):
            logits = policy.model(input_ids=torch.tensor([ids])).logits[:, -1]
            logits = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), logits)
            ids.append(int(logits.argmax()))
            if ids[-1] in policy.eos_ids:
                break
        assert list(row[0].token_ids) == ids[len(prompt.token_ids) :]


def test_the_end_token_is_kept_and_finish_reasons_are_true(policy: Policy) -> None:
    with torch.no_grad():  # make the end token about as likely as all others together
        policy.model.model.embed_tokens.weight[policy.eos_ids[0]] *= 0
        policy.model.model.embed_tokens.weight[policy.eos_ids[0], 0] = 6.0
    rows = LocalGenerator(policy, batch_size=2).generate(prompts(policy), 64, Sampling(3), 0, ())
    completions: list[Completion] = [completion for row in rows for completion in row]
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}
    for completion in completions:
        ended = completion.token_ids[-1] in policy.eos_ids
        assert completion.finish_reason == ("stop" if ended else "length")
        assert len(completion.token_ids) == len(completion.behaviour_logprobs) <= 3
        assert ended or len(completion.token_ids) == 3
        assert not set(completion.token_ids[:-1]) & set(policy.eos_ids)
        assert "<|end|>" not in completion.text


def test_a_limit_on_tokens_draws_fewer_at_once_and_the_same(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, real = list[int](), ways.start

    def noted(used: Policy, given: Sequence[Sequence[int]], k: int, most: int) -> Any:
        rows.append(len(given) * k)
        assert len(given) * k * (max(map(len, given)) + most) <= max(limit, longest + most)
        return real(used, given, k, most)

    asked = prompts(policy)
    longest = max(len(prompt.token_ids) for prompt in asked)
    expected = LocalGenerator(policy, batch_size=3).generate(asked, 5, Sampling(6), 0, ("key",))
    monkeypatch.setattr(ways, "start", noted)
    for at_once in (0, 1, 2, 4, 5, 11, 99):
        rows.clear()
        limit = at_once * (longest + 6) + 1
        found = LocalGenerator(policy, batch_size=3, tokens=limit).generate(asked, 5, Sampling(6), 0, ("key",))
        assert [[each.token_ids for each in row] for row in found] == [
            [each.token_ids for each in row] for row in expected
        ]
        assert sum(rows) == 5 * len(asked)
        if at_once >= 5:
            assert max(rows) == 5 * min(3, at_once // 5, len(asked))
        else:
            assert max(rows) == max(1, at_once)


def test_completions_carry_the_version_that_sampled_them(policy: Policy) -> None:
    generator = LocalGenerator(policy, batch_size=2)
    generator.sync(7)
    assert generator.generate(prompts(policy)[:1], 1, Sampling(2), 0, ())[0][0].policy_version == 7


def grouped_heads(policy: Policy) -> Policy:
    """A model with two query heads for each key head."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "initializer_range": 0.2,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(policy.tokenizer), **sizes, **heads)).eval()
    return replace(policy, model=model)


def other_family(policy: Policy) -> Any:
    """A model that can be packed but is not of the Llama family."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": len(policy.tokenizer), "n_embd": 32, "n_layer": 2, "n_head": 4}
    ends = {"bos_token_id": policy.eos_ids[0], "eos_token_id": policy.eos_ids[0]}  # GPT-2's are no tokens here
    return GPT2LMHeadModel(GPT2Config(**sizes, **ends, initializer_range=0.2)).eval()


def alike(asked: list[Prompt]) -> list[Prompt]:
    """Prompts after the same beginning, two of them with the same tokens."""
    longer = [replace(prompt, token_ids=(*range(5, 25), *prompt.token_ids)) for prompt in asked]
    return [*longer, replace(longer[0], problem_id="twin")]


@pytest.mark.parametrize("given", ["one length", "ragged", "alike"])
@pytest.mark.parametrize("family", ["plain", "grouped heads", "other family"])
@pytest.mark.parametrize("kind", ["shared", "copies", "summed"])
def test_both_decoders_draw_the_same(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, given: str, family: str, kind: str
) -> None:
    monkeypatch.setattr(tuning, "COPIED_TOKENS", 0 if kind == "shared" else 10**6)
    monkeypatch.setattr(tuning, "SUMMED_NUMBERS", 10**6 if kind == "summed" else 0)
    grouped = replace(policy, model=grouped_heads(policy).model)
    strange = replace(policy, model=other_family(policy))
    used = {"plain": policy, "grouped heads": grouped, "other family": strange}[family]
    questions = {"one length": prompts(used)[:1], "ragged": prompts(used), "alike": alike(prompts(used))}[given]
    packer, sampling = (
        partial(decoding.PackedDecoder, written_out=family != "other family"),
        Sampling(150),
    )  # longer than the buffers grow at once
    rows = 16 if given == "one length" else 6  # of each prompt: enough to end at several lengths

    def sample(decoder: Any) -> list[list[Completion]]:
        monkeypatch.setattr(ways, "prefill", lambda *given: decoder(*given[: 4 if decoder is packer else 2]))
        return LocalGenerator(used, batch_size=4).generate(questions, rows, sampling, 0, ())

    assert ways.sampler(used) == ways.Sampler("packed", written_out=family != "other family")
    named = {"shared": kv_cache.Shared, "copies": kv_cache.Copies, "summed": kv_cache.Summed}
    expected = named["copies" if kind == "summed" and family == "grouped heads" else kind]
    tokens = [prompt.token_ids for prompt in questions]
    assert type(packer(used, tokens, rows, 4)._cache) is expected
    assert (common_prefix(tokens) > 0) is (given == "alike")
    packed, cached = sample(packer), sample(decoding.CacheDecoder)
    assert len({len(completion.token_ids) for row in packed for completion in row}) > 2
    for one, other in zip(packed, cached, strict=True):
        assert [c.token_ids for c in one] == [c.token_ids for c in other]
        for a, b in zip(one, other, strict=True):
            assert a.behaviour_logprobs == pytest.approx(b.behaviour_logprobs, abs=1e-4)


@pytest.mark.parametrize("kind", ["shared", "copies", "summed", "the model's"])
def test_rows_are_computed_once_while_they_are_alike(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(tuning, "COPIED_TOKENS", 0 if kind == "shared" else 10**6)
    monkeypatch.setattr(tuning, "SUMMED_NUMBERS", 10**6 if kind == "summed" else 0)
    assert ways.sampler(policy).way == "packed"
    held: list[int] = []

    def prefill(*given: Any) -> decoding.Decoder:
        decoder: decoding.Decoder = decoding.CacheDecoder(*given[:2])
        if kind != "the model's":
            decoder = decoding.PackedDecoder(*given, written_out=True)
        step = decoder.step

        def counted(tokens: torch.Tensor) -> None:
            held.append(len(tokens))
            step(tokens)

        monkeypatch.setattr(decoder, "step", counted)
        return decoder

    monkeypatch.setattr(ways, "prefill", prefill)
    # eight rows of each prompt at this temperature draw a few different answers, which many tokens end
    used = replace(policy, eos_ids=tuple(range(3, policy.model.config.vocab_size, 7)))
    sampling, questions = Sampling(40, temperature=0.05), [*prompts(policy), *alike(prompts(policy))]

    def sample(alike: float) -> list[list[Completion]]:
        held.clear()
        monkeypatch.setattr(tuning, "DISTINCT_SHARE", alike)
        return LocalGenerator(used, batch_size=9).generate(questions, 8, sampling, 0, ())

    apart, rows = sample(0.0), sum(held)
    together, computed = sample(1.0), sum(held)
    different = {(i, c.token_ids[:n]) for i, row in enumerate(apart) for c in row for n in range(1, len(c.token_ids))}
    assert len({len(completion.token_ids) for row in apart for completion in row}) > 2
    assert len(different) < 0.8 * rows
    assert computed <= 1.2 * len(different)  # a few rows that have ended are carried along
    for one, other in zip(apart, together, strict=True):
        assert [c.token_ids for c in one] == [c.token_ids for c in other]
        for a, b in zip(one, other, strict=True):
            assert a.behaviour_logprobs == pytest.approx(b.behaviour_logprobs, abs=1e-4)


class Histories:
    """A decoder whose logits are what each of its rows has been given: the prompt's number, then tokens."""

    def __init__(self, prompts: int) -> None:
        self.rows = [str(prompt) for prompt in range(prompts)]

    @property
    def logits(self) -> torch.Tensor:
        return torch.tensor([[float(row), 0.0, 0.0] for row in self.rows], dtype=torch.float64)

    def step(self, tokens: torch.Tensor) -> None:
        self.rows = [row + str(token) for row, token in zip(self.rows, tokens.tolist(), strict=True)]

    def keep(self, index: torch.Tensor) -> None:
        self.rows = [self.rows[i] for i in index.tolist()]
        assert [row[0] for row in self.rows] == sorted(row[0] for row in self.rows)


@pytest.mark.parametrize(("prompts", "k"), [(1, 1), (1, 2), (1, 4), (1, 8), (2, 4), (3, 3), (4, 8)])
def test_rows_part_and_leave_in_any_order(prompts: int, k: int) -> None:
    parted = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        decoder = Histories(prompts)
        branches, rows = decoding.Branches(decoder, k), [str(i // k) for i in range(prompts * k)]
        alike, ends = rng.choice([0.3, 0.8, 0.95]), rng.choice([0.0, 0.1, 0.4])
        for _ in range(10):
            assert branches.logits[:, 0].tolist() == [float(row) for row in rows]
            tokens = np.where(rng.random(len(rows)) < alike, 1, rng.integers(0, 3, len(rows)))
            index = np.flatnonzero(rng.random(len(rows)) >= ends)
            if not len(index):
                break
            if len(index) < len(rows):
                branches.keep(torch.from_numpy(index))
            rows = [rows[i] + str(tokens[i]) for i in index]
            branches.step(torch.from_numpy(tokens[index]))
            assert len(set(rows)) <= len(decoder.rows) <= 1.12 * len(rows) + 1
        parted += branches._apart
    assert parted > 20  # and some never


def test_models_that_cannot_be_packed_use_their_own_cache(policy: Policy) -> None:
    assert isinstance(ways.prefill(policy, [[5, 6]], 2, 4), decoding.PackedDecoder)
    plain = replace(policy, model=grouped_heads(policy).model)
    plain.model.set_attn_implementation("eager")
    assert isinstance(ways.prefill(plain, [[5, 6]], 2, 4), decoding.CacheDecoder)


def test_steps_are_written_out_only_where_that_is_known_to_work(policy: Policy) -> None:
    def step(used: Policy) -> Any:
        decoder = ways.prefill(used, [[5, 6]], 2, 4)
        assert isinstance(decoder, decoding.PackedDecoder)
        return decoder._forward

    assert isinstance(step(policy), LlamaStep)
    assert not isinstance(step(replace(policy, dtype=torch.bfloat16)), LlamaStep)
    assert not isinstance(step(replace(policy, model=other_family(policy))), LlamaStep)


class Casts(TorchDispatchMode):
    """Counts conversions of tensors of one shape."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        casts = (torch.ops.aten._to_copy, torch.ops.aten.to)
        if function.overloadpacket in casts and args[0].shape == self.shape and args[0].dtype == torch.float32:
            self.count += 1
        return function(*args, **(kwargs or {}))


def test_low_precision_casts_the_weights_once_per_call(policy: Policy) -> None:
    low = replace(policy, dtype=torch.bfloat16)
    assert ways.sampler(low).way == "packed"
    with Casts(low.model.model.layers[0].mlp.up_proj.weight.shape) as casts:
        completions = LocalGenerator(low, batch_size=3).generate(prompts(low), 2, Sampling(12), 0, ())[0]
    assert max(len(completion.token_ids) for completion in completions) > 3
    projections = 2 * len(low.model.model.layers)  # gate and up have this shape
    assert casts.count == projections
    assert {parameter.dtype for parameter in low.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("written_out", [True, False])
def test_tokens_that_the_tokenizer_does_not_know_are_never_sampled(policy: Policy, written_out: bool) -> None:
    """And what is trained on is the distribution of those that it does know."""
    known = replace(policy, sampled=40, written_out=written_out)
    completions = LocalGenerator(known, batch_size=3).generate(prompts(known), 8, Sampling(12), 0, ())
    rows = [
        Row(prompt.token_ids, completion.token_ids, completion.behaviour_logprobs, 1.0, False)
        for prompt, row in zip(prompts(known), completions, strict=True)
        for completion in row
    ]
    assert max(token for row in rows for token in row.completion_ids) == 39
    free = LocalGenerator(policy, batch_size=3).generate(prompts(known), 8, Sampling(12), 0, ())
    assert max(token for row in free for completion in row for token in completion.token_ids) > 100
    for model in (known, replace(known, model=eager(known))):
        scored, entropy = Scorer(model, 1.0).score(rows)
        assert Scorer(model, 1.0).shares is (model is known)
        for at, row in enumerate(rows):
            assert scored[at, : len(row.completion_ids)].tolist() == pytest.approx(row.behaviour_logprobs, abs=1e-4)
        assert 0 < float(entropy.max()) <= math.log(40) + 1e-5


def eager(policy: Policy) -> Any:
    """The same weights, which cannot be packed."""
    model = type(policy.model)._from_config(copy.deepcopy(policy.model.config), attn_implementation="eager").eval()
    model.load_state_dict(policy.model.state_dict())
    return model
