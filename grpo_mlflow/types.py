"""The records that flow between the stages of an iteration.

    Task(seed) -> Problem -> Prompt --Generator--> Completion --verify--> Rollout  xK  -> Group

All are frozen: a stage adds to what it was given by making the next record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import ConfigDict, with_config

Split = Literal["train", "eval"]
FinishReason = Literal["stop", "length"]
_written = with_config(ConfigDict(ser_json_inf_nan="constants"))  # a log-prob may be -inf


@dataclass(frozen=True, slots=True)
class Problem:
    """One question with what is needed to check an answer to it."""

    id: str
    seed: int
    messages: tuple[Mapping[str, str], ...]
    payload: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a generator is given: a problem's messages and their token ids."""

    problem_id: str
    messages: tuple[Mapping[str, str], ...]
    token_ids: tuple[int, ...]


@_written
@dataclass(frozen=True, slots=True)
class Completion:
    """What a generator gives back.

    `token_ids` keeps the end-of-sequence token where one was sampled. `behaviour_logprobs` has one entry per
    token: the log-probability under the distribution that the token was drawn from, after temperature,
    penalties and truncation. `policy_version` is the number of iterations behind the sampling weights. `trained` is
    True on the tokens that the loss counts; None: on all of them. A token that the model did not write (the answer of
    a tool) is read by those after it, but not trained on.

    Raises:
        ValueError: `trained` has another length than `token_ids`.
    """

    token_ids: tuple[int, ...]
    text: str
    behaviour_logprobs: tuple[float, ...]
    finish_reason: FinishReason
    policy_version: int
    trained: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        if self.trained is not None and len(self.trained) != len(self.token_ids):
            raise ValueError(f"{len(self.trained)} marks of trained tokens for {len(self.token_ids)} tokens")

    @property
    def is_truncated(self) -> bool:
        """Whether it reached its longest length without an end."""
        return self.finish_reason == "length"


@_written
@dataclass(frozen=True, slots=True)
class Verdict:
    """A task's judgement of one text. `parsed` is None where the text holds no well-formed answer.

    Where the task has rewards by name, `values` are what they gave, None where one does not apply to the text, and
    `weights` their weights; `parts` are then weight times value of those that apply.
    """

    reward: float
    parts: Mapping[str, float]
    success: bool
    parsed: str | None
    values: Mapping[str, float | None] | None = None
    weights: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True)
class Rollout:
    """One completion of one prompt, judged."""

    prompt: Prompt
    completion: Completion
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Group:
    """K rollouts of one problem with their advantages, in the same order."""

    problem: Problem
    rollouts: tuple[Rollout, ...]
    advantages: tuple[float, ...]

    @property
    def is_flat(self) -> bool:
        """True if the group carries no learning signal: all its advantages are 0, as where all rewards are equal."""
        return not any(self.advantages)
