"""Rows of the user's own: what they ask comes from a column, what an answer is worth from rewards.

A seed names a row, modulo their number, in an order that is shuffled once: a file may be sorted, and an evaluation of
its first rows would be one of a single kind. So as many seeds as rows, whatever the first, name each row once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from grpo_mlflow import seeding
from grpo_mlflow.config.schema import RowsConfig
from grpo_mlflow.errors import ConfigError
from grpo_mlflow.tasks.base import Pending, Task, untagged
from grpo_mlflow.tasks.rewards.texts import Exact as ExactReward
from grpo_mlflow.tasks.tables import places, records, splits
from grpo_mlflow.tasks.tables.fields import ANSWER, Form, Unfit, as_text
from grpo_mlflow.types import Completion, Problem, Split, Verdict

PATH, EVAL_PATH = "data.rows.path", "data.rows.eval_path"
_LOOKED_AT = 1000  # rows that tell which columns there are
_INNER = "data"  # where the files of a data set of the hub lie
_NO_ANSWER = (
    f"{ANSWER} = null: {{}}: there is no column 'answer', and data.rewards is empty, so nothing says what is right; "
    f"there are: {{}}; allowed: {ANSWER}=COLUMN, or data.rewards that need no answer"
)
SPLITS: tuple[Split, ...] = ("train", "eval")


class Rewards(Protocol):
    """Judges texts in batches; `begin` does so in the background, and is given the token ids of the texts."""

    reward_range: tuple[float, float]

    def judge(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Verdict]: ...

    def begin(self, problems: Sequence[Problem], texts: Sequence[str], ids: Sequence[Sequence[int]]) -> Pending: ...

    def require_fit(self, columns: Collection[str], *, answers: bool) -> None: ...

    def at(self, iteration: int, iterations: int) -> None: ...

    def figures(self) -> Mapping[str, float]: ...

    def logged(self) -> Mapping[str, tuple[float, int]]: ...


class Exact:
    """1 for the right answer, in the one pair of tags or as the whole text; case and white space make no difference."""

    reward_range = 0.0, 1.0

    def judge(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Verdict]:
        return [self._verdict(problem, text) for problem, text in zip(problems, texts, strict=True)]

    def begin(self, problems: Sequence[Problem], texts: Sequence[str], ids: Sequence[Sequence[int]]) -> Pending:
        return lambda: self.judge(problems, texts)

    def require_fit(self, columns: Collection[str], *, answers: bool) -> None:
        return None  # that all rows have answers is seen when they are read

    def at(self, iteration: int, iterations: int) -> None: ...

    def figures(self) -> Mapping[str, float]:
        return {}

    def logged(self) -> Mapping[str, tuple[float, int]]:
        return {}

    def _verdict(self, problem: Problem, text: str) -> Verdict:
        value = ExactReward().score(problem, text, None) or 0.0
        return Verdict(value, {"exact": value}, value == 1.0, untagged(text))


class Rows(Task):
    """Problems from rows, judged by `rewards`."""

    name = "rows"

    def __init__(self, settings: RowsConfig, rewards: Rewards | None = None) -> None:
        self.table, unanswered = _read(settings)
        if rewards is None and unanswered is not None:
            raise ConfigError(unanswered)
        self._form = Form(settings.prompt, settings.answer)
        self._rewards = rewards or Exact()
        first = [records.unpack(row) for row in self.table.rows["train"][:_LOOKED_AT]]
        columns = dict.fromkeys(name for row in first for name in row)
        self._rewards.require_fit([*columns], answers=any(self._form.answer(row) is not None for row in first))
        self.reward_range = self._rewards.reward_range
        self._orders = {
            split: seeding.stream(0, self.name, split).permutation(len(self.table.rows[split])) for split in SPLITS
        }

    def problem(self, split: Split, seed: int) -> Problem:
        order = self._orders[split]
        row = records.unpack(self.table.rows[split][order[seed % len(order)]])
        messages, conversational = self._form.messages(row)
        payload = {"columns": row, "answer": self._form.answer(row), "conversational": conversational}
        return Problem(f"{self.name}/{split}/{seed}", seed, messages, payload)

    def verify(self, problem: Problem, text: str) -> Verdict:
        return self._rewards.judge([problem], [text])[0]

    def begin(self, problems: Sequence[Problem], completions: Sequence[Completion]) -> Pending:
        texts, ids = [each.text for each in completions], [each.token_ids for each in completions]
        return self._rewards.begin(problems, texts, ids)

    def at(self, iteration: int, iterations: int) -> None:
        self._rewards.at(iteration, iterations)

    def figures(self) -> Mapping[str, float]:
        return self._rewards.figures()

    def logged(self) -> Mapping[str, tuple[float, int]]:
        return self._rewards.logged()

    def reference_answer(self, problem: Problem) -> str:
        """Return the right answer, the first where several are accepted.

        Raises:
            ConfigError: the rows have none.
        """
        answer = problem.payload["answer"]
        if answer is None:
            raise ConfigError(
                f"{ANSWER} = null: the rows have no answers to warm the embedded model up with; allowed: the column "
                "with the right answer, or another model.train_id"
            )
        return as_text(answer[0] if isinstance(answer, list) else answer)


def load(settings: RowsConfig) -> splits.Splits[bytes]:
    """Return the rows of both splits, each as JSON; files that have not changed are read once.

    Raises:
        ConfigError: there are no such rows.
        UserError: the hub gives none.
    """
    return _read(settings)[0]


def _read(settings: RowsConfig) -> tuple[splits.Splits[bytes], str | None]:
    """Return what `load` does, and a line about the first row without an answer, if there is one."""
    stamps = tuple(places.stamp(path, _INNER) for path in (settings.path, settings.eval_path) if path)
    return _loaded(settings, stamps)


@lru_cache(maxsize=2)
def _loaded(settings: RowsConfig, stamps: tuple[object, ...]) -> tuple[splits.Splits[bytes], str | None]:
    if settings.path is None:
        raise ConfigError(
            f"{PATH} = null: data.task = 'rows' needs rows; allowed: a file, a folder or a hub id (ORG/NAME)"
        )
    source = splits.Source(
        key=PATH,
        path=settings.path,
        name="rows",
        suffixes=tuple(records.READERS),
        inner=_INNER,
        eval_key=EVAL_PATH,
        eval_path=settings.eval_path,
        share=settings.eval_share,
    )
    parse = _Parse(Form(settings.prompt, settings.answer))
    return splits.load(source, parse), parse.unanswered


@dataclass(slots=True)
class _Parse:
    """Makes of a record what is compared and kept of it; `unanswered` is a line about the first one without answer."""

    form: Form
    unanswered: str | None = None

    def __call__(self, record: Any, where: str) -> splits.Asked[bytes]:
        """Return the question, the answer, and the record as JSON; raise ConfigError where it is none to ask."""
        try:
            messages, _ = self.form.messages(record)
            answer = self.form.answer(record)
            packed = records.pack(record)
        except Unfit as error:
            file = where.partition(": ")[2]
            raise ConfigError(f"{error.start}: {file}: {error.what}") from None
        except (ValueError, TypeError, RecursionError) as error:
            raise ConfigError(f"{where}: cannot be kept: {error}") from None
        if answer is None and self.unanswered is None:
            self.unanswered = _NO_ANSWER.format(where.partition(": ")[2], ", ".join(record))
        question = messages[0]["content"] if len(messages) == 1 else "\n".join(map(_line, messages))
        return splits.Asked(question, repr(answer), packed)


def _line(message: Mapping[str, str]) -> str:
    return f"{message['role']}: {message['content']}"
