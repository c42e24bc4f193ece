"""A task whose verdicts are looked at: what a run cannot use ends it in one line, and keeps the text in a file."""

from __future__ import annotations

import inspect
import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import fields, replace
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from grpo_mlflow.errors import UserError, one_line
from grpo_mlflow.runtime import interrupts
from grpo_mlflow.tasks.base import Pending, Task, awaited
from grpo_mlflow.tasks.unjudged import keep
from grpo_mlflow.tasks.wrapped import Wrapped
from grpo_mlflow.types import Completion, Problem, Split, Verdict


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

    def begin(self, problems: Sequence[Problem], completions: Sequence[Completion]) -> Pending:
        """Begin to judge: in the background if the task does, or its `verify_batch` is async.

        What is returned raises as `verify` does.
        """
        own, texts = type(self._task), [completion.text for completion in completions]
        if getattr(own, "begin", Task.begin) is not Task.begin:
            return self._task.begin(problems, completions)
        if getattr(own, "verify_batch", Task.verify_batch) is Task.verify_batch:
            return lambda: list(awaited(self.verify_batch(problems, texts)))
        judge = partial(self._batch, problems, texts)
        if not inspect.iscoroutinefunction(self._task.verify_batch):
            return judge
        # daemon: nobody waits for one that hangs when the run ends
        future: Future[list[Verdict]] = Future()
        threading.Thread(target=_fulfil, args=(future, judge), daemon=True).start()
        return future.result

    def at(self, iteration: int, iterations: int) -> None:
        if hasattr(self._task, "at"):
            self._task.at(iteration, iterations)

    def figures(self) -> Mapping[str, float]:
        return self._task.figures() if hasattr(self._task, "figures") else {}

    def logged(self) -> Mapping[str, tuple[float, int]]:
        return self._task.logged() if hasattr(self._task, "logged") else {}

    def _batch(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Verdict]:
        """Return the task's verdicts on a batch, looked at as those of `verify`."""
        begins = f"of a batch of {len(texts)}, which begins with problem"
        try:
            with interrupts.deferred():
                given: Any = awaited(self._task.verify_batch(problems, texts))
            found = list(given)
        except (Exception, SystemExit) as error:
            what = f"raised {type(error).__name__}: {one_line(error)}"
            raise UserError(self._line(problems[0], "\n".join(map(json.dumps, texts)), what, begins)) from error
        if len(found) != len(texts):
            what = f"gave {len(found)} verdicts; allowed: one for each"
            raise UserError(self._line(problems[0], "\n".join(map(json.dumps, texts)), what, begins))
        for problem, text, verdict in zip(problems, texts, found, strict=True):
            if wrong := objection(verdict):
                raise UserError(self._line(problem, text, wrong))
        return [_plain(verdict) for verdict in found]

    def _line(self, problem: Problem, text: str, what: str, of: str = "of problem") -> str:
        kept = keep(self._folder, problem, text)
        return f"data.task = {self._called!r}: verify {of} {problem.id!r} (seed {problem.seed}) {what}{kept}"


def _fulfil(future: Future[list[Verdict]], judge: Callable[[], list[Verdict]]) -> None:
    try:
        future.set_result(judge())
    except BaseException as error:
        future.set_exception(error)


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
