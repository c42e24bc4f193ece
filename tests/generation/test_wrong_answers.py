"""Completions that cannot be what was asked for: another prompt's, the same one several times, tokens that are none."""

from __future__ import annotations

import math
from typing import Any

import pytest

from grpo_mlflow.generation import Sampling
from grpo_mlflow.generation.server.copies import copied
from grpo_mlflow.generation.server.engine import Ask, draw_of
from grpo_mlflow.runtime.http.client import Fault

ASK = Ask((1, 2), 2, Sampling(8), 0, (0,))


@pytest.mark.parametrize(
    "ids", [[3.7, 4], [3.0, 4], ["3", 4], [True, 4], [None, 4], [[3], 4], "34", {"3": 4}, 34, [math.nan]]
)
def test_token_ids_are_whole_numbers(ids: Any) -> None:
    with pytest.raises(Fault, match="not numbers"):
        draw_of(ids, [-0.1, -0.2], "length", ASK)


@pytest.mark.parametrize("values", [["-0.1", -0.2], [True, -0.2], [None, -0.2], "12", {"-1": 0, "-2": 0}, 5])
def test_logprobs_are_numbers(values: Any) -> None:
    with pytest.raises(Fault, match="not numbers"):
        draw_of([3, 4], values, "length", ASK)


def test_a_completion_of_another_prompt_is_none_of_this() -> None:
    assert draw_of([3, 4], [-0.1, -0.2], "length", ASK, prompt=[1, 2])
    others: list[Any] = [[1, 3], [1], [], "12", {}, [1.5, 2]]
    for other in others:
        with pytest.raises(Fault, match="another prompt"):
            draw_of([3, 4], [-0.1, -0.2], "length", ASK, prompt=other)


def test_whole_log_probabilities_are_numbers_too() -> None:
    assert draw_of([3, 4], [0, -1], "length", ASK).logprobs == (0.0, -1.0)


def same(k: int, length: int, each: float) -> str | None:
    """Judge k equal completions whose tokens have the log-probability `each`."""
    return copied([tuple(range(length))] * k, [(each,) * length] * k)


@pytest.mark.parametrize(
    ("k", "length", "probability", "suspicious"),
    [
        (8, 200, 0.5, True),
        (2, 200, 0.5, True),
        (8, 5, 0.4, True),  # 1 in 10^13 that seven more are like the first
        (2, 5, 0.4, False),  # a short answer, twice
        (8, 3, 0.9, False),  # the likely short answer of a trained model
        (8, 400, 0.9999, False),  # a long one that it is sure of
        (1, 400, 0.5, False),
        (16, 1, 0.3, False),
    ],
)
def test_equal_completions_are_suspicious_where_chance_does_not_bring_them(
    k: int, length: int, probability: float, suspicious: bool
) -> None:
    assert (same(k, length, math.log(probability)) is not None) == suspicious


def test_some_copies_among_others_are_found() -> None:
    rows = [tuple(range(start, start + 60)) for start in (0, 1, 2, 0)]
    assert copied(rows, [(-1.0,) * 60] * 4) is not None
    assert copied(rows[:3], [(-1.0,) * 60] * 3) is None


def test_the_likeliest_price_of_a_copy_counts_and_what_was_not_priced_does_not() -> None:
    rows = [tuple(range(40))] * 2
    assert copied(rows, [(-1.0,) * 40, (-0.001,) * 40]) is None  # where the server's prices differ
    assert copied(rows, [(-50.0, *[-0.01] * 39)] * 2) is None  # rounding put one token outside top-p here
