"""The tasks that problems come from, and how many of them an iteration holds."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue
from pydantic_core import PydanticCustomError

from grpo_mlflow.config.fields import (
    OWN,
    Form,
    Fraction,
    NonNegative,
    Positive,
    PositiveFloat,
    Section,
    as_tuple,
    setting,
)


class ArithmeticConfig(Section, resume=False, compared=True, varies=False, secret=False, evaluation=True):
    """Sums, differences and products of whole numbers."""

    operations: Annotated[tuple[Literal["+", "-", "*"], ...], Field(min_length=1), BeforeValidator(as_tuple)] = setting(
        ("+",), "operations that problems are drawn from"
    )
    digits: Annotated[int, Field(ge=1, le=9)] = setting(2, "decimal digits of each operand")
    terms: Annotated[int, Field(ge=2, le=6)] = setting(2, "operands per problem")


class SatConfig(Section, resume=False, compared=True, varies=False, secret=False, evaluation=True):
    """Random satisfiable 3-SAT, answered with one bit per variable."""

    difficulty: Annotated[tuple[Fraction, Fraction], BeforeValidator(as_tuple)] = setting(
        (0.3, 0.7),
        "range [low, high], each 0 to 1, that the difficulty of a problem is drawn from; 0: 4 variables, 1: up to 15",
    )


class Gsm8kConfig(Section, resume=False, compared=True, varies=False, secret=False, evaluation=True):
    """Word problems of grade-school mathematics."""

    path: str | None = setting(
        None,
        "folder or file with the columns question and answer (parquet or jsonl); null: openai/gsm8k from the hub",
    )


class RowsConfig(Section, resume=False, compared=True, varies=False, secret=False, evaluation=True):
    """Rows of your own: where they are, and which columns they have."""

    path: str | None = setting(
        None,
        "rows to learn from: a file or folder (jsonl, json, csv, parquet), or a hub id such as openai/gsm8k:main; "
        "not null with task rows",
    )
    eval_path: str | None = setting(
        None,
        "rows to evaluate on; null: the files of path whose names say test or validation, else a part of all rows",
    )
    eval_share: Annotated[float, Field(gt=0, lt=1)] = setting(
        0.2, "share of the rows that is kept for evaluation if neither eval_path nor file names say which"
    )
    prompt: Annotated[str, Field(min_length=1)] = setting(
        "prompt",
        "column with the prompts (texts, or lists of chat messages), or a template such as '{question} Think first.'",
    )
    answer: str | None = setting(None, "column with the right answers; null: the column answer, if there is one")


TASK_NAMES = "'arithmetic' or 'sat', 'gsm8k', 'rows', 'mix', reasoning_gym/NAME or python:MODULE:CLASS"
_TASK_NAME = re.compile(rf"arithmetic|sat|gsm8k|rows|mix|reasoning_gym/[a-z0-9_]+|{OWN}")


def _task_name(name: str) -> str:
    if not _TASK_NAME.fullmatch(name):
        raise PydanticCustomError("task_name", "input should be {names}", {"names": TASK_NAMES})
    return name


TaskName = Annotated[
    str,
    AfterValidator(_task_name),
    Form(
        f"^({_TASK_NAME.pattern})$",
        choices=("arithmetic", "sat", "gsm8k", "rows", "mix"),
        shown="arithmetic, sat, gsm8k, rows, mix, reasoning_gym/NAME or python:MODULE:CLASS",
    ),
]
_SOURCE = r"^(live|runs:/[0-9a-f]{32})$"
Source = Annotated[str, Field(pattern=_SOURCE), Form(_SOURCE, choices=("live",), shown="live or runs:/RUN_ID")]


class DataConfig(Section, resume=False, compared=True, varies=True, secret=False):
    """The task, how many problems and completions an iteration has, and the rewards."""

    task: TaskName = setting(
        "sat",
        "what the model learns: a task of this package, or python:MODULE:CLASS of your own (docs/tasks.md)",
        varies=False,
        evaluation=True,
    )
    source: Source = setting(
        "live", "live: sample rollouts; runs:/RUN_ID: train on the rollouts that a run has kept", evaluation=False
    )
    problems_per_iteration: Positive = setting(4, "problems per iteration", evaluation=False)
    rollouts_per_problem: Annotated[int, Field(ge=2)] = setting(
        4, "completions per problem (K); a group whose K rewards are all equal teaches nothing", evaluation=False
    )
    resample_rounds: NonNegative = setting(
        0,
        "how often an iteration may sample further problems in place of groups whose rewards are all "
        "equal (DAPO); 0: never",
        evaluation=False,
    )
    train_seed_start: NonNegative = setting(1000, "number of the first training problem", evaluation=False)
    num_train_seeds: Positive = setting(64, "number of training problems", evaluation=False)
    system_prompt: str | None = setting(
        None, "first message of every prompt; null: the task's own, or none", varies=False, evaluation=True
    )
    overlong_buffer: NonNegative = setting(
        0,
        "length in tokens, before max_new_tokens, over which the training reward falls by up to 1 (DAPO); 0: off",
        evaluation=False,
    )
    mix: dict[str, PositiveFloat] = setting(
        {},
        "with task mix: names of tasks and their weights, such as {arithmetic: 0.7, sat: 0.3}",
        varies=False,
        evaluation=True,
    )
    rewards: dict[str, JsonValue] = setting(
        {},
        "with task rows: rewards by name, each a weight or {use: NAME or python:MODULE:FUNCTION, weight: "
        "1, OPTIONS} (docs/rewards.md)",
        varies=False,
        secret=True,
        evaluation=True,
    )
    success: str | dict[str, JsonValue] | None = setting(
        None,
        "reward that counts as success in pass@k: its name, or {name: NAME, at_least: 1}; null: the first "
        "of data.rewards",
        varies=False,
        secret=True,
        evaluation=True,
    )
    reward_timeout: PositiveFloat = setting(
        60.0,
        "seconds that a reward function may take for a batch",
        resume=True,
        compared=False,
        varies=False,
        evaluation=False,
    )
    arithmetic: ArithmeticConfig = ArithmeticConfig()
    sat: SatConfig = SatConfig()
    gsm8k: Gsm8kConfig = Gsm8kConfig()
    rows: RowsConfig = RowsConfig()
    reasoning_gym: dict[str, JsonValue] = setting(
        {}, "settings of a generator of reasoning-gym, as a mapping", varies=False, evaluation=True
    )
    settings: dict[str, JsonValue] = setting(
        {},
        "keyword arguments of a task of your own (python:MODULE:CLASS), as a mapping",
        varies=False,
        secret=True,
        evaluation=True,
    )

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks that problems come from."""
        return tuple(self.mix) if self.task == "mix" else (self.task,)
