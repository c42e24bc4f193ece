"""How reward functions are called: with the keywords that TRL gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grpo_mlflow.types import Problem

TAKEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
_OF_THE_SAMPLE = ("prompt", "completion", "completion_ids")  # TRL gives these as lists under other names
TokenIds = Sequence[Sequence[int]]


def keywords(problems: Sequence[Problem], texts: Sequence[str], ids: TokenIds) -> dict[str, Any]:
    """Return the keywords for a sample each: strings, or message lists where the row's prompt is one, and its columns.

    A column must not have the name of another keyword (`fit.require`).
    """
    columns: dict[str, list[Any]] = {}
    for place, problem in enumerate(problems):
        for name, value in problem.payload["columns"].items():
            columns.setdefault(name, [None] * len(problems))[place] = value
    for name in _OF_THE_SAMPLE:
        columns.pop(name, None)
    return {
        "prompts": [_prompt(problem) for problem in problems],
        "completions": [_completion(problem, text) for problem, text in zip(problems, texts, strict=True)],
        "completion_ids": [list(each) for each in ids],
        **columns,
    }


def plain_keywords(problems: Sequence[Problem], texts: Sequence[str], ids: TokenIds) -> dict[str, Any]:
    """Return what the built-in functions of `isolated` are called with."""
    return {
        "completions": list(texts),
        "answers": [problem.payload.get("answer") for problem in problems],
        "completion_ids": [list(each) for each in ids],
    }


def _prompt(problem: Problem) -> str | list[Mapping[str, str]]:
    if problem.payload["conversational"]:
        return [dict(message) for message in problem.messages]
    return problem.messages[-1]["content"]


def _completion(problem: Problem, text: str) -> str | list[Mapping[str, str]]:
    return [{"role": "assistant", "content": text}] if problem.payload["conversational"] else text
