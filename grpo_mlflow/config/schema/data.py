"""The tasks that problems come from, and how many of them an iteration holds."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue
from pydantic_core import PydanticCustomError

from grpo_mlflow.config.fields import Fraction, NonNegative, Positive, PositiveFloat, Section, as_tuple


class ArithmeticConfig(Section):
    operations: Annotated[tuple[Literal["+", "-", "*"], ...], BeforeValidator(as_tuple), Field(min_length=1)] = Field(
        ("+",), description="operations to draw from"
    )
    digits: Annotated[int, Field(ge=1, le=9)] = Field(2, description="digits of each operand")
    terms: Annotated[int, Field(ge=2, le=6)] = Field(2, description="operands per problem")


class SatConfig(Section):
    difficulty: Annotated[
        tuple[Fraction, Fraction],
        BeforeValidator(as_tuple),
        Field(description="range [low, high] that problems draw d from"),
    ] = (0.3, 0.7)


class Gsm8kConfig(Section):
    path: str | None = Field(
        None, description="folder or file with question and answer, parquet or jsonl; null: openai/gsm8k from the hub"
    )


TASK_NAMES = "'arithmetic' or 'sat', 'gsm8k', 'mix', reasoning_gym/NAME or python:MODULE:CLASS"
_TASK_NAME = re.compile(r"arithmetic|sat|gsm8k|mix|reasoning_gym/[a-z0-9_]+|python:[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def _task_name(name: str) -> str:
    if not _TASK_NAME.fullmatch(name):
        raise PydanticCustomError("task_name", "input should be {names}", {"names": TASK_NAMES})
    return name


TaskName = Annotated[str, AfterValidator(_task_name)]


class DataConfig(Section):
    task: TaskName = Field("sat", description="what the model learns")
    source: Annotated[str, Field(pattern=r"^(live|runs:/[0-9a-f]{32})$")] = Field(
        "live", description="live, or runs:/RUN_ID to train on the rollouts that a run has kept"
    )
    problems_per_iteration: Positive = Field(4, description="problems per iteration")
    rollouts_per_problem: Annotated[int, Field(ge=2)] = Field(4, description="K: completions per problem")
    resample_rounds: NonNegative = Field(
        0,
        description="how often an iteration may sample further training problems in place of groups whose rewards are "
        "all equal (DAPO); 0: never",
    )
    train_seed_start: NonNegative = Field(1000, description="first training problem")
    num_train_seeds: Positive = Field(64, description="number of training problems")
    system_prompt: str | None = Field(None, description="first message of every prompt; null: the task's own, or none")
    overlong_buffer: NonNegative = Field(
        0, description="last tokens before max_new_tokens over which a training reward falls by up to 1 (DAPO); 0: off"
    )
    mix: dict[str, PositiveFloat] = Field({}, description="task = mix: names of tasks and their weights")
    arithmetic: ArithmeticConfig = ArithmeticConfig()
    sat: SatConfig = SatConfig()
    gsm8k: Gsm8kConfig = Gsm8kConfig()
    reasoning_gym: dict[str, JsonValue] = Field({}, description="settings of the generator, as a mapping")
    settings: dict[str, JsonValue] = Field({}, description="keyword arguments of a python: task, as a mapping")

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks that problems come from."""
        return tuple(self.mix) if self.task == "mix" else (self.task,)
