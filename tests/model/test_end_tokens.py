"""Which tokens a completion may have where the model has embeddings for more than its tokenizer knows: all of the
tokenizer, and those that end a completion; padding is none of them, and counts for nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grpo_mlflow.forward import ways
from grpo_mlflow.forward.padded import completion_logprobs
from grpo_mlflow.generation import Sampling
from grpo_mlflow.generation.local.generator import LocalGenerator
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.training.batching import Row
from grpo_mlflow.training.scoring import Scorer
from grpo_mlflow.types import Completion, Problem
from tests.support.roomy import KNOWN, ROWS, load

PROBLEM = Problem("p/1", 1, ({"role": "user", "content": "1 + 2 ="},), {})
WAYS = ("packed", "padded", "alike")


def likely(found: Policy, token: int) -> Policy:
    """Make a token likely after the problem's prompt."""
    ids = torch.tensor([found.prompt(PROBLEM).token_ids])
    with torch.no_grad():
        hidden = found.model.model(input_ids=ids).last_hidden_state[0, -1]
        found.model.get_input_embeddings().weight[token] = 1.4 * hidden / hidden.norm()
    return found


def drawn(found: Policy, count: int = 16) -> list[Completion]:
    (completions,) = LocalGenerator(found, 1).generate([found.prompt(PROBLEM)], count, Sampling(4), 0, ("key",))
    return completions


def row_of(prompt: tuple[int, ...], completion: tuple[int, ...]) -> Row:
    return Row(prompt, completion, (0.0,) * len(completion), 1.0, False)


def rows(found: Policy, completions: list[Completion]) -> list[Row]:
    prompt = found.prompt(PROBLEM).token_ids
    return [row_of(prompt, completion.token_ids) for completion in completions]


def score(found: Policy, way: str, scored: list[Row]) -> list[list[float]]:
    ways.know(found.model, ways.Scoring(way, reason=None if way == "packed" else "told"))  # type: ignore[arg-type]
    with torch.no_grad():
        logprobs, _ = Scorer(found, 1.0).score(scored)
    return [values[: len(row.completion_ids)].tolist() for values, row in zip(logprobs, scored, strict=True)]


@pytest.mark.parametrize("end", [KNOWN + 3, ROWS - 1])
def test_an_end_that_the_tokenizer_does_not_know_ends_completions(tmp_path: Path, end: int) -> None:
    found = likely(load(tmp_path, end), end)
    completions = drawn(found)
    ended = [completion for completion in completions if completion.finish_reason == "stop"]
    assert ended
    assert {completion.token_ids[-1] for completion in ended} == {end}


def test_without_such_an_end_no_unknown_token_is_drawn(tmp_path: Path) -> None:
    found = likely(load(tmp_path, 1), KNOWN + 3)
    assert found.sampled == KNOWN
    assert max(max(completion.token_ids) for completion in drawn(found)) < KNOWN


@pytest.mark.parametrize("ends", [(1,), (KNOWN + 3,), (1, ROWS - 1)])
@pytest.mark.parametrize("way", WAYS)
def test_any_padding_gives_the_log_probabilities_that_were_sampled_with(
    tmp_path: Path, way: str, ends: tuple[int, ...]
) -> None:
    found = likely(load(tmp_path, *ends), ends[-1])
    completions = drawn(found)
    assert len({len(completion.token_ids) for completion in completions}) > 1  # so that some rows are padded
    for pad_id in (0, ends[0], KNOWN - 1, KNOWN, ROWS - 1):
        priced = score(replace(found, pad_id=pad_id), way, rows(found, completions))
        for values, completion in zip(priced, completions, strict=True):
            assert values == pytest.approx(completion.behaviour_logprobs, abs=1e-5)


def test_padding_may_be_a_token_that_is_not_possible(tmp_path: Path) -> None:
    found = load(tmp_path, 1)
    starts, one = torch.tensor([3, 3]), [5, 6, 7, 8]
    expected, entropies = (
        values[0] for values in completion_logprobs(found.model, torch.tensor([one] * 2), starts, 1, 1.0, sampled=KNOWN)
    )
    for padding in (0, KNOWN, ROWS - 1):
        ids = torch.tensor([[*one, padding, padding], [*one, 9, 10]])
        chosen, entropy = completion_logprobs(found.model, ids, starts, 3, 1.0, sampled=KNOWN)
        torch.testing.assert_close((chosen[0, :1], entropy[0, :1]), (expected, entropies))
        assert bool(torch.isfinite(chosen).all())
        assert bool(torch.isfinite(entropy).all())


def test_a_token_that_is_not_possible_has_no_probability(tmp_path: Path) -> None:
    """So it is in packed rows, too."""
    found = load(tmp_path, 1)
    row = [row_of((5, 6, 7), (8, KNOWN, 9))]
    packed, padded = (score(found, way, row)[0] for way in ("packed", "padded"))
    assert packed == pytest.approx(padded)
    assert padded[1] < -1e20
