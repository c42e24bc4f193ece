"""Computing each prompt once: the same log-probabilities and gradients as computing it for every completion."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from grpo_mlflow.forward import trial, tuning, ways
from grpo_mlflow.forward.prefix_tree import common_prefix
from grpo_mlflow.training.batching import Limits, Row, micro_batches, prompt_batches
from grpo_mlflow.training.scoring import Scorer
from tests.support.packed_rows import MODELS, SHAPES, build, rows, scorer
from tests.support.small_models import SIZES


def results(made: Scorer, given: list[Row], shares: bool, entropy_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    model = made._policy.model
    made.shares = shares
    logprobs, entropy = made.score(given, entropy_gradient=entropy_gradient)
    coefficients = torch.randn(2, *logprobs.shape, generator=torch.Generator().manual_seed(2))
    loss = (logprobs * coefficients[0]).sum()
    if entropy_gradient:
        loss = loss + (entropy * coefficients[1]).sum()
    model.zero_grad()
    loss.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    return logprobs.detach(), entropy.detach(), gradient


def assert_alike(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Assert that two `results` are the same sums in float32, their terms added up in another order.

    Rounding is a share of the largest terms. Where terms cancel it is a large share of what is left, a larger one on
    some processors than on others, so elements are compared on the scale of the tensor: log-probabilities and entropies
    on that of the largest log-probability, since both come from the logits.

    Measured with several sets of weights: each way is up to 31 epsilons of that scale off float64, and both are up to
    20 apart. To round each weight once moves the gradient by up to 33 epsilons of its norm; each way is up to 200 off
    float64, and both are up to 80 apart.
    """
    epsilon = torch.finfo(torch.float32).eps
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert (one - other).abs().max() < 32 * epsilon * expected[0].abs().max()
    error, gradient = found[2] - expected[2], expected[2]
    assert error.norm() < 1e-5 * gradient.norm()
    assert error.abs().max() < 2e-5 * gradient.abs().max()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("entropy_gradient", [True, False])
def test_shared_prompts_equal_padded_rows(name: str, shape: str, entropy_gradient: bool) -> None:
    made, given = scorer(build(name)), rows(shape)
    assert made.shares
    expected = results(made, given, False, entropy_gradient)
    assert expected[2].norm() > 1
    assert_alike(results(made, given, True, entropy_gradient), expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if "one token" not in shape])
def test_completions_that_attend_one_by_one_equal_padded_rows(name: str, shape: str) -> None:
    made, given = scorer(build(name)), rows(shape)
    expected = results(made, given, False, True)
    with tuning.set_to(trial.LONG_COMPLETIONS):
        assert_alike(results(made, given, True, True), expected)


@pytest.mark.parametrize("shape", ["ragged", "alike, ragged"])
def test_gradient_checkpointing_changes_nothing(shape: str) -> None:
    made, given = scorer(build("llama")), rows(shape)
    written_out = results(made, given, True, True)
    model, calls = made._policy.model, []
    model.train()  # checkpointing is off in evaluation mode, and `llama_pass` in this one; the model has no dropout
    expected = results(made, given, True, True)
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    # the second is what older versions of transformers call it
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    found = results(made, given, True, True)
    assert len(calls) == 2  # forward, and again in the backward pass
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert_alike(found, written_out)


def test_a_completion_drawn_several_times_is_computed_once() -> None:
    made, different, seen = scorer(build("llama")), rows("ragged"), []
    given = [*different[:3], *different, different[1]]
    expected = results(made, given, False, True)
    made._policy.model.model.embed_tokens.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    found = results(made, given, True, True)
    made.score(different)
    assert seen[0] == seen[1]
    assert_alike(found, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_each_prompt_and_what_all_share_is_computed_once_and_no_last_token(shape: str) -> None:
    made, given, seen = scorer(build("llama")), rows(shape), []
    mlp = made._policy.model.model.layers[0].mlp
    mlp.gate_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    made.score(given)
    alike, rests, completions = SHAPES[shape]
    assert seen == [(alike + sum(rests) + sum(size - 1 for group in completions for size in group), 48)]


def test_what_prompts_share_leaves_each_its_last_token() -> None:
    long = list(range(40))
    assert common_prefix([long, [*long, 1], [*long, 2]]) == 39
    assert common_prefix([[*long, 1, 5], [*long, 2, 5]]) == 40
    assert common_prefix([long, long]) == 39  # two problems may be the same
    assert common_prefix([long]) == 0
    assert common_prefix([[7, *long], long]) == 0
    assert common_prefix([long[:9], [*long[:8], 1]]) == 0  # saves too little
    assert common_prefix([[*long[:4], *[n] * 32] for n in range(9)]) == 4
    assert common_prefix([[*long[:4], *[n] * 33] for n in range(9)]) == 0  # a word before long prompts
    assert common_prefix([]) == 0


@pytest.mark.parametrize(("name", "computed"), [("llama", []), ("gpt2", [(1, 1, 200)])])
def test_the_output_layer_computes_no_logits_but_a_single_token(name: str, computed: list[Any]) -> None:
    made, seen = scorer(build(name)), []
    made._policy.model.lm_head.register_forward_hook(lambda _, __, output: seen.append(output.shape))
    made.score(rows("ragged"))
    assert seen == computed


@pytest.mark.parametrize("shape", ["ragged", "alike, ragged"])
def test_low_precision_shares_as_well(shape: str) -> None:
    made = scorer(build("llama"), 1.0, torch.bfloat16)
    given = rows(shape)
    found, expected = (results(made, given, shares, True) for shares in (True, False))
    assert found[0].dtype == torch.float32
    assert (found[0] - expected[0]).abs().max() < 0.5
    assert (found[0] - expected[0]).abs().mean() < 0.1
    assert found[2].dtype == torch.float32
    assert (found[2] - expected[2]).norm() < 0.05 * expected[2].norm()


@pytest.mark.parametrize(
    "model",
    [
        lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)),
        lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, sliding_window=4)),
        lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="eager")),
    ],
    ids=["sliding window", "soft-capped logits", "eager attention"],
)
def test_other_models_take_the_padded_path_and_say_why(model: Any) -> None:
    made = scorer(model().eval())
    assert not made.shares
    assert made.reason
    assert "\n" not in made.reason
    logprobs, _ = made.score(rows("ragged"))
    assert logprobs.isfinite().all()


def test_generation_is_left_as_it_was() -> None:
    model, ids = build("llama"), torch.randint(3, 200, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    before = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert ways.scoring(model).way == "packed"
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False), before)


def test_batches_stay_within_the_token_limit() -> None:
    """Hand-counted: a prompt's tokens once where rows are packed, all places of the widest row where padded."""
    first, second = (1, 2, 3), (4, 5, 6, 7)
    given = [Row(prompt, (9,) * new, (0.0,) * new, 1.0, False) for prompt, new in ((first, 2), (first, 3), (second, 9))]
    for tokens, expected in ((21, [[0, 1, 2]]), (20, [[0, 1], [2]]), (8, [[0, 1], [2]]), (7, [[0], [1], [2]])):
        assert prompt_batches(given, range(3), Limits(8, tokens)) == expected
    for tokens, expected in ((39, [[0, 1, 2]]), (38, [[0, 1], [2]]), (12, [[0, 1], [2]]), (11, [[0], [1], [2]])):
        assert micro_batches(given, range(3), Limits(8, tokens)) == expected
    assert prompt_batches(given, range(3), Limits(1, 21)) == [[0], [1], [2]]


def test_batches_keep_prompts_together_within_the_row_limit() -> None:
    given = rows("ragged")
    for size in (1, 2, 3, 4, 100):
        batches = prompt_batches(given, range(len(given)), Limits(size))
        assert sorted(i for batch in batches for i in batch) == list(range(len(given)))
        assert max(map(len, batches)) <= size
        pieces = [len({given[i].prompt_ids for i in batch}) for batch in batches]
        largest = max(sum(row.prompt_ids == other.prompt_ids for row in given) for other in given)
        if size >= largest:  # then no prompt is computed twice
            assert sum(pieces) == len({row.prompt_ids for row in given})
