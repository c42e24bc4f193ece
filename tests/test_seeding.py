"""Streams are keyed by every part of their key, and by nothing else."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from grpo_mlflow import seeding

KEYS: list[tuple[int | str, ...]] = [
    (0,),
    (1,),
    (0, 1),
    (0, "1"),
    (0, "ab", "c"),
    (0, "a", "bc"),
    (0, "abc"),
    (0, "a", "b", "c"),
    (0, "a, b"),
    (0, "a", "b"),
    (0, "a', 'b"),
    (0, 1, 23),
    (0, 12, 3),
    (0, 123),
    (123, 0),
    (0, -1),
    (0, ""),
    (0, "", ""),
    (0, "rollout", 3, 7),
    (0, "rollout", 7, 3),
    (0, "evaluation", 3, 7),
    (1, "rollout", 3, 7),
]


def _first(key: tuple[int | str, ...]) -> float:
    seed = key[0]
    assert isinstance(seed, int)
    return float(seeding.stream(seed, *key[1:]).random())


@pytest.mark.parametrize("key", KEYS, ids=repr)
def test_same_key_gives_same_draws(key: tuple[int | str, ...]) -> None:
    seed = key[0]
    assert isinstance(seed, int)
    first, second = (seeding.stream(seed, *key[1:]).integers(0, 2**60, size=50) for _ in range(2))
    assert first.tolist() == second.tolist()
    assert seeding.integer(seed, *key[1:]) == seeding.integer(seed, *key[1:])


def test_every_part_of_the_key_counts() -> None:
    assert len({_first(key) for key in KEYS}) == len(KEYS)
    assert len({seeding.integer(0, *key) for key in KEYS}) == len(KEYS)
    assert len(np.unique(seeding.uniforms(0, KEYS, 1))) == len(KEYS)
    assert seeding.uniforms(1, KEYS, 1)[0] != seeding.uniforms(0, KEYS, 1)[0]


def test_a_stream_does_not_move_another() -> None:
    expected = seeding.stream(5, "b").random(10).tolist()
    seeding.stream(5, "a").random(1000)
    np.random.default_rng(5).random(1000)
    assert seeding.stream(5, "b").random(10).tolist() == expected


def test_streams_of_neighbouring_seeds_and_indices_are_unrelated() -> None:
    draws = np.array(
        [seeding.stream(seed, "x", index).standard_normal(2000) for seed in range(4) for index in range(4)]
    )
    correlation = np.corrcoef(draws) - np.eye(len(draws))
    # the standard error of one correlation is 1 / sqrt(2000) = 0.022; the largest of 120 stays within five of them
    assert np.abs(correlation).max() < 0.11


def test_uniforms_are_uniform_and_unrelated() -> None:
    keys: list[tuple[int | str, ...]] = [("x", problem, place) for problem in ("a", "b") for place in range(8)]
    draws = seeding.uniforms(0, keys, 2000)
    assert draws.min() >= 0.0
    assert draws.max() < 1.0
    counts = np.bincount((draws * 100).astype(int).ravel(), minlength=100)
    # chi-square of 99 degrees of freedom: above 160 with a probability of 1e-4
    assert ((counts - draws.size / 100) ** 2 / (draws.size / 100)).sum() < 160
    correlation = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlation).max() < 0.11
    assert abs(np.corrcoef(draws[:, 1:].ravel(), draws[:, :-1].ravel())[0, 1]) < 5 / np.sqrt(draws.size)


def test_few_uniforms_are_the_first_of_many_whoever_draws_beside() -> None:
    many = seeding.uniforms(3, [("a", 1), ("b", 2)], 100)
    assert seeding.uniforms(3, [("b", 2)], 7).tolist() == [many[1, :7].tolist()]


def test_integers_fill_63_bits() -> None:
    values = [seeding.integer(3, "server", index) for index in range(4000)]
    assert all(type(value) is int and 0 <= value < 2**63 for value in values)
    assert len(set(values)) == len(values)
    for bit in range(63):
        share = sum(value >> bit & 1 for value in values) / len(values)
        assert 0.45 < share < 0.55, f"bit {bit} is set in {share:.1%}"


def test_another_process_draws_the_same() -> None:
    program = (
        "from grpo_mlflow import seeding; "
        "print(seeding.integer(7, 'problem', 3), *seeding.stream(7, 'problem', 3).integers(0, 10**9, size=5), "
        "*(int(drawn * 2**53) for drawn in seeding.uniforms(7, [('problem', 3)], 5)[0]))"
    )
    here = [seeding.integer(7, "problem", 3), *seeding.stream(7, "problem", 3).integers(0, 10**9, size=5).tolist()]
    here += [int(drawn * 2**53) for drawn in seeding.uniforms(7, [("problem", 3)], 5)[0]]
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        assert [int(word) for word in done.stdout.split()] == here
