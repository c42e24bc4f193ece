"""A task of the user's own: `python:module:Class`, imported from the current folder or PYTHONPATH."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from grpo_mlflow.errors import ConfigError, one_line
from grpo_mlflow.runtime import own_code
from grpo_mlflow.tasks.base import Task
from grpo_mlflow.tasks.judged import objection, unencodable, unwritable
from grpo_mlflow.types import Problem

_MEMBERS = ("name", "phrases", "reward_range", "problem", "verify", "reference_answer", "demonstration", "chance")


def load(task: str, settings: Mapping[str, Any]) -> Task:
    """Return an instance of the class with the settings as keyword arguments.

    Raises:
        ConfigError: it cannot be imported or made, lacks a member of `Task`, or fails on its own problem.
    """
    kind = own_code.load("data.task", task, "class")
    start, name = f"data.task = {task!r}", task.rpartition(":")[2]
    lacks = [m for m in _MEMBERS if not hasattr(kind, m) or m in getattr(kind, "__abstractmethods__", ())]
    if lacks:
        raise ConfigError(
            f"{start}: {name} lacks {', '.join(lacks)}; allowed: a class with {', '.join(_MEMBERS)} (docs/own_task.md)"
        )
    try:
        made: Task = kind(**settings)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"data.settings = {dict(settings)}: {name} refuses: {one_line(error)}") from error
    _try(made, f"{start}: {name}")
    return made


def _try(task: Task, start: str) -> None:
    """Make one problem of each split and judge its own answer: what is wrong here would spoil a whole run."""
    if not _is_range(task.reward_range):
        raise ConfigError(
            f"{start}: reward_range = {task.reward_range!r}; allowed: two finite numbers, the lower reward first"
        )
    for split in ("train", "eval"):
        try:
            problem, again = task.problem(split, 0), task.problem(split, 0)
            answer = task.reference_answer(problem)
            verdict = task.verify(problem, answer)
        except (Exception, SystemExit) as error:
            raise ConfigError(f"{start} fails on its own problem: {type(error).__name__}: {one_line(error)}") from error
        if not isinstance(problem, Problem) or problem != again:
            raise ConfigError(
                f"{start}: problem({split!r}, 0) is not always the same Problem; allowed: draws from its seed"
            )
        if what := unwritable(problem):
            raise ConfigError(f"{start}: problem({split!r}, 0): {what}; allowed: what JSON can hold")
        if what := unencodable(answer):
            raise ConfigError(f"{start}: reference_answer of problem({split!r}, 0) {what}")
        if what := objection(verdict):
            raise ConfigError(f"{start}: verify of the reference_answer of problem({split!r}, 0) {what}")
        if not verdict.success:
            raise ConfigError(
                f"{start}: reference_answer of problem({split!r}, 0) does not succeed; allowed: one that does"
            )


def _is_range(value: object) -> bool:
    """Return whether it is a pair of numbers that an interval can be scaled to."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        return False
    return all(isinstance(end, (int, float)) and math.isfinite(end) for end in value) and value[0] < value[1]
