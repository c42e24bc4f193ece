"""Whether rewards and rows fit together, known before anything is sampled."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from grpo_mlflow.errors import ConfigError
from grpo_mlflow.tasks.rewards import rubric
from grpo_mlflow.tasks.rewards.calling import TAKEN
from grpo_mlflow.tasks.rewards.entries import Entry

_OF_THE_ANSWER = ("exact", "contains", "number", "math")
_ALWAYS = ("question", "completion")


def require(entries: Iterable[Entry], columns: Collection[str], *, answers: bool) -> None:
    """Refuse what would give no row a reward, or another than it says.

    Args:
        columns: of the rows.
        answers: whether any row has an answer.

    Raises:
        ConfigError: one line for each such reward.
    """
    lines = [line for entry in entries for line in _objections(entry, columns, answers)]
    if lines:
        raise ConfigError("\n".join(dict.fromkeys(lines)))


def _objections(entry: Entry, columns: Collection[str], answers: bool) -> Iterable[str]:
    known = f"the rows have {', '.join(columns)}"
    if entry.own is not None:
        if taken := [name for name in columns if name in TAKEN]:
            yield f"{entry.key}: the rows have a column {taken[0]}, which functions get otherwise; rename it"
        if both := [name for name in entry.options if name in columns]:
            yield f"{entry.key}: {both[0]} is an option and a column of the rows; allowed: one of them"
    elif entry.use in _OF_THE_ANSWER and entry.options.get("text") is None and not answers:
        yield f"{entry.key}: {entry.use} needs the right answer; {known}; allowed: data.rows.answer=COLUMN"
    elif entry.use == "judge":
        named = [name for name in rubric.fields(str(entry.options.get("rubric", ""))) if name not in _ALWAYS]
        for name in named:
            if name not in columns and not (name == "answer" and answers):
                yield f"{entry.key}: rubric: there is no column {name!r}; {known}; allowed: these, question, completion"
