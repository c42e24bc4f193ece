"""The interface between training and whatever samples completions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from grpo_mlflow.config import GenerationConfig
from grpo_mlflow.types import Completion, Prompt

Drawn = Callable[[int, Sequence[tuple[tuple[int, ...], str]]], None]
"""Is told the number of a prompt, and the token ids and the text of each of its completions."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to draw. `temperature` 0 is greedy; `top_p` 1, `top_k` <= 0 and `repetition_penalty` 1 are off."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    repetition_penalty: float = 1.0

    @property
    def is_plain(self) -> bool:
        """Whether tokens are drawn with the model's own probabilities."""
        return (self.temperature, self.repetition_penalty) == (1.0, 1.0) and self.top_p >= 1 and self.top_k <= 0


def training_sampling(config: GenerationConfig) -> Sampling:
    """Return how training completions are drawn."""
    return Sampling(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        repetition_penalty=config.repetition_penalty,
    )


class Generator(Protocol):
    """Draws K completions for each prompt."""

    def generate(
        self, prompts: Sequence[Prompt], k: int, sampling: Sampling, seed: int, key: tuple[str | int, ...]
    ) -> list[list[Completion]]:
        """Return K completions per prompt, in the order of the prompts.

        The draws of replicate j of a problem depend on (`seed`, `key`, problem id, j) only: neither on the other
        prompts nor on K.
        """
        ...

    def sync(self, version: int) -> None:
        """Take on the policy's current weights, those after `version` iterations; no work where they are there."""
        ...

    def metrics(self) -> dict[str, float]:
        """Return what happened since the last call, as metrics of `perf/`."""
        ...


@runtime_checkable
class Streaming(Protocol):
    """A generator that gives the completions of some prompts before it samples those of others."""

    def stream(
        self, prompts: Sequence[Prompt], k: int, sampling: Sampling, seed: int, key: tuple[str | int, ...]
    ) -> Iterator[list[list[Completion]]]:
        """Yield what `Generator.generate` would return in parts, in the order of the prompts."""
        ...


@runtime_checkable
class Telling(Protocol):
    """A generator that tells what it has drawn for a prompt while it draws for others."""

    def tell(
        self,
        prompts: Sequence[Prompt],
        k: int,
        sampling: Sampling,
        seed: int,
        key: tuple[str | int, ...],
        *,
        drawn: Drawn,
    ) -> list[list[Completion]]:
        """Return what `Generator.generate` would, and call `drawn` in another thread as soon as a prompt is done.

        What it tells may be drawn again: then it tells the prompt again.
        """
        ...


@runtime_checkable
class InProcess(Protocol):
    """A generator that computes with the weights of this process."""

    def weights(self) -> AbstractContextManager[None]:
        """Hold all weights inside the block; processes that hold one model together enter it together."""
        ...


def weights(generator: Generator) -> AbstractContextManager[None]:
    """Hold what a generator samples with inside the block; all processes enter it together."""
    return generator.weights() if isinstance(generator, InProcess) else nullcontext()


class Resting(Protocol):
    """A generator whose servers can give up memory while nothing is sampled."""

    def rest(self) -> None:
        """Let them do so until they are next asked; nothing may be under way."""
        ...


@runtime_checkable
class Pricing(Protocol):
    """A generator whose completions may get log-probabilities later, from a model that processes hold in shards."""

    def prices_together(self) -> bool:
        """Return whether they do."""
        ...

    def prices(
        self, asked: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]], sampling: Sampling
    ) -> list[list[tuple[float, ...]]]:
        """Return the log-probability of each token of prompts and their completions; all processes call it together."""
        ...

    def require_drawn_apart(
        self, completions: Sequence[tuple[int, ...]], logprobs: Sequence[Sequence[float]], sampling: Sampling
    ) -> None:
        """Refuse completions of a prompt of which one draw was given several times.

        Raises:
            ServerFailed: they are.
        """
        ...


class Begun(Protocol):
    """Completions that are being sampled elsewhere."""

    def result(self) -> list[list[Completion]]:
        """Wait, and return what `Generator.generate` would."""
        ...

    def succeeded(self) -> bool:
        """Return whether all are there, without waiting."""
        ...

    def cancel(self) -> None: ...


class Overlapping(Generator, Protocol):
    """A generator that can sample while the caller does something else."""

    def begin(
        self, prompts: Sequence[Prompt], k: int, sampling: Sampling, seed: int, key: tuple[str | int, ...]
    ) -> Begun:
        """Begin to sample as `generate` would, with the weights of the last `sync`; the next must wait for the end."""
        ...


def work(key: Sequence[str | int]) -> str:
    """Return what is sampled, in words, from the key of its draws."""
    return {"eval": "evaluation", "train": "rollouts"}.get(str(key[0]) if key else "", "sampling")
