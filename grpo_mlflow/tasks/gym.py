"""`reasoning_gym/NAME`: the generators of the package reasoning-gym (Stojanovski et al. 2025, arXiv 2505.24760).

Datasets of neighbouring seeds share nearly all items there, so each problem is a dataset of its own, of one item, whose
seed comes from our stream; the hash of its question decides its split. Scoring is strict: full score or nothing, and no
credit for part of an answer. Entries are drawn again where their own answer does not succeed or where a meaningless
text does (equations without a solution), so each problem can be solved and cannot be solved by nothing; and where the
generator raises.

`composite` is no generator but a mixture: `data.task=mix` does that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import io
import json
import logging
import math
import os
import random
import re
import warnings
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from grpo_mlflow.errors import ConfigError, one_line
from grpo_mlflow.runtime import interrupts
from grpo_mlflow.tasks.base import Task, draw, tagged, untagged
from grpo_mlflow.tasks.judges import JUDGES
from grpo_mlflow.types import Problem, Split, Verdict

WEIGHTS = {"correct": 0.9, "tags": 0.1}
PREFIX = "reasoning_gym/"
HASHED = frozenset({"isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder"})
"""Generators whose items depend on the order of Python's sets, so on PYTHONHASHSEED."""
_FULL = 1 - 1e-9
_MOST_RAISED = 20
_ROOM = 400  # characters that an answer may have beyond four times the generator's own: some judges take n^2 steps
_MEANINGLESS = ("?", "banana")
_HUGE = re.compile(r"(?<![0-9A-Za-z.])[0-9.]+[eE]\+?[0-9]{4,}")  # 1e999999999 as an exact fraction fills the memory
_COUNTS = {"rubiks_cube": re.compile("[0-9]"), "rush_hour": re.compile("[0-9]{2}")}
"""Counts that no right answer has, and that the judges would carry out one by one: U999999999."""
_INSTRUCTION = "\n\nGive the final answer alone inside <SOLUTION></SOLUTION>."
_log = logging.getLogger(__name__)


def generators() -> list[str]:
    """Return the names of all generators; reasoning-gym must be installed."""
    return sorted(set(_factory().DATASETS) - {"composite"})


class ReasoningGym(Task):
    """One generator with its own settings.

    Raises:
        ConfigError: there is no such generator, or it refuses the settings.
    """

    def __init__(self, generator: str, settings: Mapping[str, Any]) -> None:
        self.name, self.generator, self.settings = PREFIX + generator, generator, dict(settings)
        if generator not in generators():
            close = difflib.get_close_matches(generator, generators(), n=3) or generators()
            raise ConfigError(f"data.task = {self.name!r}: no such generator; allowed: {', '.join(close)}")
        if generator in HASHED and not os.environ.get("PYTHONHASHSEED", "random").isdigit():
            raise ConfigError(
                f"data.task = {self.name!r}: its problems depend on Python's hash seed and would differ between "
                "processes; allowed: with PYTHONHASHSEED=0 in the environment"
            )
        self.entry = lru_cache(maxsize=1024)(self._make)
        self._require_settings()

    def problem(self, split: Split, seed: int) -> Problem:
        def propose(rng: np.random.Generator) -> int:
            raised = 0
            for _ in range(100):
                item = int(rng.integers(2**31))
                try:
                    if self._is_sound(item):
                        return item
                    raised = 0
                except Exception as error:  # some generators give up on some seeds: maze finds no cell to start from
                    raised += 1
                    if raised == _MOST_RAISED:
                        raise ValueError(f"{raised} items in a row cannot be made: {one_line(error)}") from error
            raise ValueError(f"task {self.name}: its settings leave no problem that can be judged")

        item = draw(self.name, split, seed, propose, lambda item: str(self.entry(item)["question"]))
        return Problem(
            id=f"{self.name}/{split}/{seed}",
            seed=seed,
            messages=({"role": "user", "content": self.entry(item)["question"] + _INSTRUCTION},),
            payload={"_item": item},
        )

    def verify(self, problem: Problem, text: str) -> Verdict:
        answer = untagged(text)
        success = answer is not None and self._is_right(answer, self.entry(problem.payload["_item"]))
        tags = answer is not None and answer != text.strip()
        parts = {"correct": WEIGHTS["correct"] * success, "tags": WEIGHTS["tags"] * tags}
        return Verdict(reward=math.fsum(parts.values()), parts=parts, success=success, parsed=answer)

    def reference_answer(self, problem: Problem) -> str:
        answer = _own_answer(self.entry(problem.payload["_item"]))
        if answer is None:
            raise ConfigError(
                f"data.task = {self.name!r}: has no answers of its own to warm the embedded model up with; allowed: "
                "another model.train_id"
            )
        return tagged(answer)

    def _is_sound(self, item: int) -> bool:
        entry = self.entry(item)
        answer = _own_answer(entry)
        solvable = answer is None or (bool(answer.strip()) and self._is_right(answer.strip(), entry))
        return solvable and not any(self._is_right(text, entry) for text in _MEANINGLESS)

    def _is_right(self, answer: str, entry: Mapping[str, Any]) -> bool:
        if len(answer) > 4 * len(_own_answer(entry) or "") + _ROOM or _HUGE.search(answer):
            return False
        if (counts := _COUNTS.get(self.generator)) and counts.search(answer):
            return False
        try:
            if self.generator in JUDGES:
                return JUDGES[self.generator](answer, entry)
            with _contained():
                return float(entry["score"](answer, entry)) >= _FULL
        except Exception as error:  # some judges raise on text that is no answer: that is wrong, not an accident
            _log.debug("%s cannot judge %r: %s", self.name, answer[:100], error)
            return False

    def _make(self, item: int) -> dict[str, Any]:
        with _contained(), _seeded(item):
            dataset = _factory().create_dataset(self.generator, seed=item, size=1, **self.settings)
            return {**dataset[0], "score": dataset.score_answer}

    def _require_settings(self) -> None:
        fields = {field.name for field in dataclasses.fields(_factory().DATASETS[self.generator][1])} - {"seed", "size"}
        unknown = set(self.settings) - fields
        try:
            if unknown:
                raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
            self.problem("train", 0)
        except Exception as error:  # whatever a generator does with settings that it does not expect
            raise ConfigError(
                f"data.reasoning_gym = {self.settings}: {self.generator} refuses: {one_line(error) or 'a value'}; "
                f"allowed: {', '.join(sorted(fields)) or 'no settings'}"
            ) from error


def _factory() -> Any:
    return importlib.import_module("reasoning_gym.factory")


def _own_answer(entry: Mapping[str, Any]) -> str | None:
    """Return the answer that the generator gives, be it under the metadata; None where it gives none."""
    known, metadata = entry["answer"], entry["metadata"]
    if known is None and "possible_answer" in metadata:
        return json.dumps(metadata["possible_answer"])
    if known is None:
        known = metadata.get("example_answer", metadata.get("example_correct_answer"))
    return None if known is None else str(known)


@contextlib.contextmanager
def _contained() -> Iterator[None]:
    """Keep what generators and judges print and warn about out of the run's own output, and signals out of their bare
    excepts."""
    with interrupts.deferred(), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _seeded(item: int) -> Iterator[None]:
    """Give generators that draw from the global generators the item's own draws, and put those back."""
    plain, arrays = random.getstate(), np.random.get_state()
    random.seed(item)
    try:
        yield
    finally:
        random.setstate(plain)
        np.random.set_state(arrays)
