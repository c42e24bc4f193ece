"""From texts to verdicts by the rewards that a config names."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as futures_wait
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from grpo_mlflow.config import Config
from grpo_mlflow.errors import ConfigError, UserError
from grpo_mlflow.runtime import functions as processes
from grpo_mlflow.runtime.functions import FunctionFailed
from grpo_mlflow.tasks.base import Pending, untagged
from grpo_mlflow.tasks.rewards import calling, entries, fit
from grpo_mlflow.tasks.rewards.entries import Entry, Success
from grpo_mlflow.tasks.rewards.judge import Judge, Settings
from grpo_mlflow.tasks.rewards.texts import KINDS, Scorer
from grpo_mlflow.tasks.unjudged import keep
from grpo_mlflow.types import Problem, Verdict

T = TypeVar("T")
Values = list[float | None]
_GRACE = 5.0  # seconds
_ISOLATED = {"math": "mathematics", "regex": "regex", "json_schema": "json_schema"}
_ISOLATED_FILE = str(Path(__file__).with_name("isolated.py"))
_PACKAGES = {"math": ("math_verify", "math-verify"), "json_schema": ("jsonschema", "jsonschema")}


class RewardFailed(UserError):
    """A reward gave nothing that can be used. The run can be resumed: nothing of it is lost."""


@dataclass(frozen=True, slots=True)
class _Process:
    """Functions that share a process, and how their keywords are made."""

    functions: processes.Functions
    keywords: Callable[[Sequence[Problem], Sequence[str], calling.TokenIds], dict[str, Any]]


class Rewards:
    """Judges texts in batches by all `named` rewards.

    Args:
        named: the rewards, and what only success is judged by.
        weighted: how many of them are rewards.
        success: which counts for pass@k.
        config: its timeouts hold.
        folder: where texts go that cannot be judged; None: nowhere.
    """

    def __init__(
        self, named: Sequence[Entry], weighted: int, success: Success, config: Config, folder: Path | None
    ) -> None:
        self._entries, self._weighted, self._success = named, named[:weighted], success
        self._folder, self._timeout = folder / "unjudged" if folder else None, config.data.reward_timeout
        self._scorers: dict[str, Scorer] = {}
        self._judges: dict[str, Judge] = {}
        asked = config.generation
        for entry in named:
            if entry.use in KINDS:
                self._scorers[entry.name] = entries.made(KINDS[entry.use], entry)
            elif entry.use == "judge":
                settings = entries.made(Settings, entry)
                self._judges[entry.name] = Judge(entry.name, entry.key, settings, asked.timeout, asked.retry_seconds)
        self._processes = _started(named)
        ends = [sorted(entry.weight * end for end in entry.range) for entry in self._weighted]
        low, high = (math.fsum(ends_[side] for ends_ in ends) for side in (0, 1))
        self.reward_range = (low, high) if low < high else (low, low + 1.0)
        self._logged: dict[str, tuple[float, int]] = {}
        self.at(0, config.train.iterations)

    def require_fit(self, columns: Collection[str], *, answers: bool) -> None:
        """Raise ConfigError if one of the rewards can never apply to rows with these columns (see `fit`)."""
        fit.require(self._entries, columns, answers=answers)

    def judge(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Verdict]:
        """Return the verdict on each text.

        Raises:
            RewardFailed: a reward raises, takes too long, or gives what is no number.
            ServerFailed: a judge is away.
        """
        return self.begin(problems, texts, [()] * len(texts))()

    def begin(self, problems: Sequence[Problem], texts: Sequence[str], ids: calling.TokenIds) -> Pending:
        """Begin to judge in the background; what is returned waits for the verdicts, and raises as `judge` does."""
        if not texts:
            return list
        futures = {name: judge.begin(problems, texts) for name, judge in self._judges.items()}
        called = [
            process.functions.begin(processes.Batch(process.keywords(problems, texts, ids), self._state, self._timeout))
            for process in self._processes
        ]

        def wait() -> list[Verdict]:
            blame = partial(self._failed, problems, texts)
            try:
                values = self._scored(problems, texts, ids)
                for given in called:
                    found = _result(given, blame)
                    values |= found.values
                    self._log(found.metrics)
                values |= {name: _result(future, blame) for name, future in futures.items()}
            except BaseException as error:
                if isinstance(error, Exception):  # what a judge is about to answer is not asked again by a resumed run
                    futures_wait(futures.values(), timeout=_GRACE)
                for given in called:
                    given.cancel()
                for future in futures.values():
                    future.cancel()
                raise
            return [self._verdict({n: v[place] for n, v in values.items()}, text) for place, text in enumerate(texts)]

        return wait

    def at(self, iteration: int, iterations: int) -> None:
        """Note what functions find in TRL's `trainer_state`: a step is an iteration, and the run is one epoch."""
        epoch = iteration / iterations if iterations else 0.0
        self._state = {"global_step": iteration, "max_steps": iterations, "epoch": epoch, "num_train_epochs": 1}

    def figures(self) -> dict[str, float]:
        """Return what judges were asked since the last call, and what it cost; judges together."""
        found: dict[str, float] = {}
        for judge in self._judges.values():
            for name, value in judge.figures().items():
                found[name] = found.get(name, 0.0) + value
        return found

    def logged(self) -> dict[str, tuple[float, int]]:
        """Return what functions have logged since the last call (TRL's `log_metric`): the sum and how often."""
        logged, self._logged = self._logged, {}
        return logged

    def _scored(self, problems: Sequence[Problem], texts: Sequence[str], ids: calling.TokenIds) -> dict[str, Values]:
        found: dict[str, Values] = {}
        for name, scorer in self._scorers.items():
            values: Values = []
            for place, (problem, text) in enumerate(zip(problems, texts, strict=True)):
                try:
                    values.append(scorer.score(problem, text, len(ids[place]) or None))
                except ValueError as error:  # of a row that it is not for
                    raise self._failed(problems, texts, FunctionFailed(name, str(error), place)) from error
            found[name] = values
        return found

    def _verdict(self, values: Mapping[str, float | None], text: str) -> Verdict:
        counted = values[self._success.name]
        success = counted is not None and counted >= self._success.at_least
        own = {entry.name: values[entry.name] for entry in self._weighted}
        parts = {e.name: e.weight * value for e in self._weighted if (value := own[e.name]) is not None}
        weights = {entry.name: entry.weight for entry in self._weighted}
        return Verdict(math.fsum(parts.values()), parts, success, untagged(text), own, weights)

    def _failed(self, problems: Sequence[Problem], texts: Sequence[str], error: FunctionFailed) -> RewardFailed:
        """Return the error that the run ends with."""
        entry = next(entry for entry in self._entries if entry.name == error.name)
        where = f" ({error.line})" if error.line else ""
        own = entry.own
        who = f"function {own[1]}{where}" if own else entry.use
        place, count = error.place, len(texts)
        of = "for" if place is not None or count == 1 else f"for a batch of {count}, which begins with"
        problem, text = problems[place or 0], texts[place or 0]
        if place is None and count > 1:
            text = "\n".join(json.dumps(each) for each in texts)
        kept = keep(self._folder, problem, text)
        return RewardFailed(f"{entry.key}: {who} {error.what} {of} problem {problem.id!r} (seed {problem.seed}){kept}")

    def _log(self, metrics: Sequence[tuple[str, float]]) -> None:
        for name, value in metrics:
            total, count = self._logged.get(name, (0.0, 0))
            self._logged[name] = total + value, count + 1


def create(config: Config, folder: Path | None) -> Rewards | None:
    """Return what judges the rows of a run, or None where the config names no rewards.

    Raises:
        ConfigError: an entry is wrong, or a function or a package cannot be imported.
    """
    data = config.data
    known = entries.entries(data.rewards)
    if not known:
        return None
    success, further = entries.success(data.success, known)
    return Rewards([*known, *([further] if further else [])], len(known), success, config, folder)


def _result(future: Future[T], blame: Callable[[FunctionFailed], RewardFailed]) -> T:
    try:
        return future.result()
    except FunctionFailed as error:
        raise blame(error) from error


def _started(named: Sequence[Entry]) -> list[_Process]:
    """Return the processes of the functions, one for each module: what its functions share stays shared."""
    modules: dict[str, list[Entry]] = {}
    for entry in named:
        if entry.use in _ISOLATED:
            modules.setdefault(_ISOLATED_FILE, []).append(_checked(entry))
        elif own := entry.own:
            modules.setdefault(own[0], []).append(entry)
    found = []
    for module, group in modules.items():
        names = {e.name: own[1] if (own := e.own) else _ISOLATED[e.use] for e in group}
        options = {entry.name: entry.options for entry in group if entry.options}
        try:
            made = processes.functions(module, names, options, each=module == _ISOLATED_FILE)
        except processes.NotLoaded as error:
            keys = ", ".join(entry.key for entry in group)
            raise ConfigError(f"{keys}: use = {group[0].use!r}: {error}") from None
        keywords = calling.plain_keywords if module == _ISOLATED_FILE else calling.keywords
        found.append(_Process(made, keywords))
    return found


def _checked(entry: Entry) -> Entry:
    """Return a built-in entry whose options its function can be called with; raise ConfigError."""
    if entry.use in _PACKAGES and find_spec(_PACKAGES[entry.use][0]) is None:
        package = _PACKAGES[entry.use][1]
        raise ConfigError(f"{entry.key}: the package {package} is not installed; allowed: after pip install {package}")
    options = entries.made({"math": _math, "regex": _regex, "json_schema": _json_schema}[entry.use], entry)
    return replace(entry, options=options)


def _math() -> dict[str, Any]:
    return {}


def _regex(pattern: str, full: bool = False) -> dict[str, Any]:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern = {pattern!r}: {error}") from None
    if not isinstance(full, bool):
        raise ValueError(f"full = {full!r}; allowed: true, false")
    return {"pattern": pattern, "full": full}


def _json_schema(schema: Mapping[str, Any] | str) -> dict[str, Any]:
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for

    content: Any = schema
    if isinstance(schema, str):
        try:
            content = json.loads(Path(schema).expanduser().read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"schema = {schema!r}: {error}") from None
    try:
        validator_for(content).check_schema(content)
    except SchemaError as error:
        raise ValueError(f"schema: {error.message}") from None
    return {"schema": content}
