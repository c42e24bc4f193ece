"""Sizes that tasks of rows set limits to.

More training seeds than rows would be the same rows again. Evaluation seeds that name a row again are no trouble: each
problem counts once (`contents`). A mix repeats rows in any case: its seeds draw the task.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from grpo_mlflow.config import Change, Config, Resolved, is_free
from grpo_mlflow.errors import ConfigError
from grpo_mlflow.tasks import gsm8k, table
from grpo_mlflow.tasks.tables.splits import LEAST, Splits

_SEEDS, _PROBLEMS = "data.num_train_seeds", "data.problems_per_iteration"


def require(config: Config) -> None:
    """Refuse more training seeds than the task has rows, or too few rows to evaluate on.

    Raises:
        ConfigError: one line.
    """
    found, data = _rows(config), config.data
    if found is None:
        return
    train, held_out = (len(found.rows[split]) for split in ("train", "eval"))
    if data.num_train_seeds > train:
        raise ConfigError(
            f"{_SEEDS} = {data.num_train_seeds}: {data.task} has {train} training rows; allowed: 1 to {train}"
        )
    if config.eval.enabled and held_out < LEAST:
        raise ConfigError(
            f"data.{data.task}: leaves {held_out} row to evaluate on; allowed: {LEAST} or more, or eval.enabled=false"
        )


def changes(resolved: Resolved, trains: bool) -> Iterator[Change]:
    """Yield what gives way to the number of rows: training seeds that nobody has chosen, or that nothing trains on.

    Rows of one's own are all trained on; of GSM8K as many as the config says, if there are so many.
    """
    found, data = _rows(resolved.config), resolved.config.data
    if found is None or (trains and not is_free(resolved.origins[_SEEDS])):
        return
    rows = len(found.rows["train"])
    why = f"there are {rows} training rows"
    if data.num_train_seeds > rows or (data.num_train_seeds < rows and data.task == "rows" and trains):
        yield Change(_SEEDS, rows, why)
    if data.problems_per_iteration > rows and not trains:
        yield Change(_PROBLEMS, rows, why)


def _rows(config: Config) -> Splits[Any] | None:
    """Return the rows of the one task that the config has; None where it is none of rows."""
    if config.data.task == "rows":
        return table.load(config.data.rows)
    return gsm8k.load(config.data.gsm8k.path) if config.data.task == "gsm8k" else None
