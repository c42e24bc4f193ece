"""What a task is, and how problems are kept apart.

A problem comes from an integer seed through a stream keyed by (task, split, seed), so neighbouring seeds share
nothing. Where the space of problems is small (two-digit sums), different seeds could still give the same problem; so
every possible content belongs by its hash to exactly one split, and a seed draws until the content fits its split. No
training range shares a problem with an evaluation range, whatever the seeds.
"""

from __future__ import annotations

import asyncio
import hashlib
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol, TypeVar

import numpy as np

from grpo_mlflow import seeding
from grpo_mlflow.runtime import interrupts
from grpo_mlflow.types import Completion, Problem, Split, Verdict

Pending = Callable[[], list[Verdict]]
"""Waits for verdicts that are on their way."""
Content = TypeVar("Content")
EVAL_SHARE = 0.2
OPEN, CLOSE = "<SOLUTION>", "</SOLUTION>"
_MOST_DRAWS = 10_000


class Task(Protocol):
    """Makes problems from integer seeds and judges texts.

    A class that names this one as its base has the members below that have a body.
    """

    name: str
    phrases: tuple[str, ...] = ()
    """The wording of prompts and answers; the embedded model's tokenizer keeps that of arithmetic and sat whole."""
    reward_range: tuple[float, float] = (0.0, 1.0)
    """The lowest and the highest reward that `verify` may give: the interval of mean@k rests on it."""

    @abstractmethod
    def problem(self, split: Split, seed: int) -> Problem:
        """Return the problem of this seed, always the same one."""

    @abstractmethod
    def verify(self, problem: Problem, text: str) -> Verdict:
        """Judge a completion by the problem's payload. Never raises; `success` needs exactly one final answer."""

    def verify_batch(
        self, problems: Sequence[Problem], texts: Sequence[str]
    ) -> Sequence[Verdict] | Awaitable[Sequence[Verdict]]:
        """Judge several completions, each of a problem; `async` or not. One by one unless a task knows better."""
        found = []
        for problem, text in zip(problems, texts, strict=True):
            with interrupts.deferred():  # a judge may catch whatever is raised in it, and go on
                found.append(self.verify(problem, text))
        return found

    def begin(self, problems: Sequence[Problem], completions: Sequence[Completion]) -> Pending:
        """Begin to judge completions, each of a problem; what is returned waits for the verdicts.

        A task that can judge in the background does so. Others judge when they are waited for.
        """
        return lambda: list(awaited(self.verify_batch(problems, [completion.text for completion in completions])))

    def at(self, iteration: int, iterations: int) -> None:
        """Note how far training is: a reward may depend on it."""
        return None

    def figures(self) -> Mapping[str, float]:
        """Return what judging has cost since the last call, as metrics of `perf/` that add up over processes."""
        return {}

    def logged(self) -> Mapping[str, tuple[float, int]]:
        """Return what the judge itself has logged since the last call: the sum of each figure, and how often."""
        return {}

    @abstractmethod
    def reference_answer(self, problem: Problem) -> str:
        """Return a completion that succeeds."""

    def demonstration(self, problem: Problem, rng: np.random.Generator, error_rate: float) -> str:
        """Return a well-formed completion that is wrong with probability `error_rate`, for a warm-up.

        Unless a task knows better, a wrong one is the answer to another problem (which may happen to be right here).
        """
        if rng.random() >= error_rate:
            return self.reference_answer(problem)
        return self.reference_answer(self.problem("train", int(rng.integers(2**40))))

    def chance(self, problem: Problem) -> float:
        """Return the success probability of a well-formed answer drawn at random: the floor to compare with.

        0 unless a task knows better: open answers are not guessed.
        """
        return 0.0


def awaited(given: Sequence[Verdict] | Awaitable[Sequence[Verdict]]) -> Sequence[Verdict]:
    """Return what `verify_batch` gives, async or not."""
    if not isinstance(given, Awaitable):
        return given

    async def wait() -> Sequence[Verdict]:
        return await given

    return asyncio.run(wait())


def tagged(answer: str) -> str:
    """Return an answer in the form that prompts ask for."""
    return f"{OPEN}{answer}{CLOSE}"


def untagged(text: str) -> str | None:
    """Return what stands in the one pair of tags of a text, the whole text where it has no tag, or None: no answer."""
    if OPEN not in text and CLOSE not in text:
        return text.strip() or None
    start, end = text.find(OPEN), text.find(CLOSE)
    if not 0 <= start < end or text.count(OPEN) > 1 or text.count(CLOSE) > 1:
        return None
    return text[start + len(OPEN) : end].strip() or None


def folded(text: str) -> str:
    """Return a text without what makes no other question of it: upper case, and how its words are spaced."""
    return " ".join(text.casefold().split())


def place_of(task: str, content: str) -> int:
    """Return the place of a problem's content among 2^64, by its hash; case and white space make no difference."""
    digest = hashlib.blake2b(f"{task}:{folded(content)}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def split_of(task: str, content: str) -> Split:
    """Return the one split that a problem's content belongs to; case and white space make no difference."""
    return "eval" if place_of(task, content) / 2**64 < EVAL_SHARE else "train"


def draw(
    task: str,
    split: Split,
    seed: int,
    propose: Callable[[np.random.Generator], Content],
    key: Callable[[Content], str],
) -> Content:
    """Return the first proposal from the seed's stream whose content belongs to the split.

    `key` names a content; equal problems (2+3 and 3+2) should have equal keys.

    Raises:
        ValueError: the task's settings allow no problem in this split.
    """
    rng = seeding.stream(seed, "problem", task, split)
    for _ in range(_MOST_DRAWS):
        content = propose(rng)
        if split_of(task, key(content)) == split:
            return content
    raise ValueError(f"task {task}: its settings leave no problem for the {split} split")
