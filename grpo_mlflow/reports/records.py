"""What pages are made of: plain records, so that a page needs neither a tracker nor a config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from grpo_mlflow.algorithm.statistics import Estimate

Table = Mapping[str, Any]  # `columns` and `data`, as a run stores the completions of an evaluation
Figures = Mapping[str, Any]  # of one iteration or evaluation, by name, `iteration` among them; None if undefined


@dataclass(frozen=True, slots=True)
class Standing:
    """What a run knows of its evaluations besides their figures: pass@1 of each problem, and which was the best.

    `replicates` are the completions of each problem.
    """

    first: Sequence[float]
    last: Sequence[float]
    replicates: int
    best_iteration: int
    best_score: float


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What the page of a run is made of.

    Args:
        iteration: completed iterations, of `planned`.
        state: how the run stands, in words.
        evaluations, iterations: figures under the names of the metrics files, in order.
        tables: the table of completions of evaluations, by iteration.
        standing: None for a run that has not kept it.
        remarks: what the run has told that should be looked at.
        facts: short facts, such as ids.
        settings: the settings that differ from what holds if nothing is set: key, value, that default.
        grad_clip: the largest norm of a gradient.
        commands: what each does, and the command.
    """

    name: str
    iteration: int
    planned: int
    state: str
    evaluations: Sequence[Figures]
    iterations: Sequence[Figures]
    tables: Mapping[int, Table] = field(default_factory=dict)
    standing: Standing | None = None
    remarks: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    settings: Sequence[tuple[str, str, str]] = ()
    grad_clip: float | None = None
    commands: Mapping[str, str] = field(default_factory=dict)


Value = float | str | None


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """A trial that has a score: that of its end, or where it stood when it was pruned.

    `curve` holds step and pass@k of each evaluation of its own; a trial that shares another's run has none.
    """

    number: int
    pruned: bool
    score: float
    settings: Mapping[str, Value]
    curve: Sequence[tuple[int, float]] = ()
    tokens: float | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting that was varied: on numbers, on a log scale or not, or among words."""

    key: str
    scale: Literal["linear", "log", "words"]
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Confirmed:
    """A trial that was measured again, with its interval; `where` says on which problems."""

    number: int
    score: Estimate
    where: str


@dataclass(frozen=True, slots=True)
class StudyRecord:
    """What the page of a study is made of.

    Args:
        k: the k of pass@k.
        lines: the outcome in words, one fact each: a word on what it is, then the fact.
        cautions: what the scores mean and what not.
        kind: `better` or `worse` than the settings that the search began with, or nothing.
        table: the columns and the rows of all trials, as text; the first cell of a row is the trial's number.
        winner, own: the numbers of the trial that won and of that with the settings the search began with.
        importances: how much each setting decides, if there are trials enough.
    """

    name: str
    k: int
    lines: Sequence[tuple[str, str]]
    cautions: str
    trials: Sequence[TrialRecord]
    settings: Sequence[Setting]
    table: tuple[Sequence[str], Sequence[Sequence[str]]]
    kind: Literal["better", "worse", ""] = ""
    confirmed: Sequence[Confirmed] = ()
    winner: int | None = None
    own: int | None = None
    importances: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    commands: Mapping[str, str] = field(default_factory=dict)
