"""Sizes that tasks of rows set limits to.

More training seeds than rows would be the same rows again. Evaluation seeds that name a row again are no trouble: each
problem counts once (`contents`).
"""

from __future__ import annotations

from collections.abc import Iterator

from grpo_mlflow.config import Change, Config, Resolved, is_free
from grpo_mlflow.errors import ConfigError
from grpo_mlflow.tasks.base import Task
from grpo_mlflow.tasks.gsm8k import Gsm8k
from grpo_mlflow.tasks.table import Rows
from grpo_mlflow.tasks.tables.splits import LEAST

_SEEDS = "data.num_train_seeds"


def require(task: Task, config: Config) -> None:
    """Refuse more training seeds than the task has rows, or too few rows to evaluate on.

    Raises:
        ConfigError: one line.
    """
    if not isinstance(task, (Gsm8k, Rows)):
        return
    train, held_out = (len(task.table.rows[split]) for split in ("train", "eval"))
    if config.data.num_train_seeds > train:
        raise ConfigError(
            f"{_SEEDS} = {config.data.num_train_seeds}: {task.name} has {train} training rows; allowed: 1 to {train}"
        )
    if config.eval.enabled and held_out < LEAST:
        raise ConfigError(
            f"data.{task.name}: leaves {held_out} row to evaluate on; allowed: {LEAST} or more, or eval.enabled=false"
        )


def changes(task: Task, resolved: Resolved) -> Iterator[Change]:
    """Yield what gives way to the number of rows: training seeds that nobody has chosen.

    Rows of one's own are all trained on; of GSM8K as many as the config says, if there are so many.
    """
    if not isinstance(task, (Gsm8k, Rows)) or not is_free(resolved.origins[_SEEDS]):
        return
    seeds, rows = resolved.config.data.num_train_seeds, len(task.table.rows["train"])
    if seeds > rows or (seeds < rows and isinstance(task, Rows)):
        yield Change(_SEEDS, rows, f"there are {rows} training rows")
