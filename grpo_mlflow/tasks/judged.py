"""A task whose verdicts are looked at: what a run cannot use ends it in one line, and keeps the text in a file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from grpo_mlflow.errors import UserError, one_line
from grpo_mlflow.runtime.files import write_whole
from grpo_mlflow.tasks.base import Task
from grpo_mlflow.tasks.wrapped import Wrapped
from grpo_mlflow.types import Problem, Split, Verdict


class Judged(Wrapped):
    """`task`, called `name` in the config; texts that it cannot judge are kept in `folder`/unjudged, if it is given."""

    def __init__(self, task: Task, name: str, folder: Path | None) -> None:
        super().__init__(task)
        self._called = name
        self._folder = folder / "unjudged" if folder is not None else None

    def problem(self, split: Split, seed: int) -> Problem:
        """Return the problem of the task.

        Raises:
            UserError: the task raises.
        """
        try:
            return self._task.problem(split, seed)
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            what = f"problem({split!r}, {seed}) raised {type(error).__name__}: {one_line(error)}"
            raise UserError(f"data.task = {self._called!r}: {what}") from error

    def verify(self, problem: Problem, text: str) -> Verdict:
        """Return the verdict of the task, its numbers as floats.

        Raises:
            UserError: `verify` raises, or gives what is no verdict.
        """
        try:
            given: Any = self._task.verify(problem, text)
        except (Exception, SystemExit) as error:
            what = f"raised {type(error).__name__}: {one_line(error)}"
            raise UserError(self._line(problem, text, what)) from error
        if wrong := objection(given):
            raise UserError(self._line(problem, text, wrong))
        return _plain(given)

    def _line(self, problem: Problem, text: str, what: str) -> str:
        start = f"data.task = {self._called!r}: verify of problem {problem.id!r} (seed {problem.seed}) {what}"
        if self._folder is None:
            return start
        name = re.sub(r"[^\w.-]+", "_", str(problem.id))[-100:]
        path = self._folder / f"{name}-{problem.seed}.txt"
        try:
            # half of a surrogate pair, which a model may write, is escaped: no file can hold it
            write_whole(path, text.encode(errors="backslashreplace").decode())
            kept = f"the text is in {path}"
        except OSError as error:
            kept = f"the text could not be kept: {one_line(error)}"
        return f"{start}; {kept}"


def objection(verdict: object) -> str | None:
    """Return what makes a verdict one that no run can use, or None."""
    if not isinstance(verdict, Verdict):
        return f"gave {_shown(verdict)}; allowed: a Verdict"
    reward, parts, success, parsed = verdict.reward, verdict.parts, verdict.success, verdict.parsed
    if not isinstance(reward, Real) or not math.isfinite(reward):
        return f"gave reward = {_shown(reward)}; allowed: a finite number"
    if not isinstance(parts, Mapping):
        return f"gave parts = {_shown(parts)}; allowed: numbers by name"
    for key, value in parts.items():
        if not isinstance(key, str) or not isinstance(value, Real):
            return f"gave the part {_shown(key)} = {_shown(value)}; allowed: numbers by name"
    if not isinstance(success, (bool, np.bool_)):
        return f"gave success = {_shown(success)}; allowed: True, False"
    if parsed is not None and not isinstance(parsed, str):
        return f"gave parsed = {_shown(parsed)}; allowed: a text, or None"
    return None


def unwritable(problem: Problem) -> str | None:
    """Return why JSON cannot hold a problem, so that no rollout of it could be kept, or None."""
    for field in fields(problem):
        try:
            json.dumps(getattr(problem, field.name), ensure_ascii=False).encode()  # half of a surrogate pair is no text
        except (TypeError, ValueError, RecursionError) as error:
            return f"its {field.name} cannot be written as JSON: {one_line(error)}"
    return None


def unencodable(text: object) -> str | None:
    """Return what makes a text one that no tokenizer takes, or None."""
    if not isinstance(text, str):
        return f"gave {_shown(text)}; allowed: a text"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"cannot be written as UTF-8: {one_line(error)}; allowed: a text without halves of surrogate pairs"
    return None


def _plain(verdict: Verdict) -> Verdict:
    """Return a verdict whose numbers are Python's own: those of numpy cannot be written as JSON."""
    own = (bool, int, float)
    if type(verdict.success) is bool and all(type(v) in own for v in (verdict.reward, *verdict.parts.values())):
        return verdict
    parts = {key: float(value) for key, value in verdict.parts.items()}
    return replace(verdict, reward=float(verdict.reward), parts=parts, success=bool(verdict.success))


def _shown(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:60]}... ({type(value).__name__})"
