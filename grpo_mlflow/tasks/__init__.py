"""Tasks: where problems come from and how answers are judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grpo_mlflow.config import Config, Resolved
from grpo_mlflow.config import fitted as fit
from grpo_mlflow.config.schema import RowsConfig
from grpo_mlflow.errors import ConfigError
from grpo_mlflow.tasks import rewards, sizes
from grpo_mlflow.tasks.arithmetic import Arithmetic
from grpo_mlflow.tasks.base import Pending, Task, draw, split_of, tagged, untagged
from grpo_mlflow.tasks.gsm8k import Gsm8k
from grpo_mlflow.tasks.gym import PREFIX, ReasoningGym
from grpo_mlflow.tasks.judged import Judged
from grpo_mlflow.tasks.mix import Mix, member_of
from grpo_mlflow.tasks.own import load as load_own
from grpo_mlflow.tasks.posed import Overlong, Posed
from grpo_mlflow.tasks.rewards import Rewards
from grpo_mlflow.tasks.sat import Sat
from grpo_mlflow.tasks.table import Rows

__all__ = [
    "TASKS",
    "Arithmetic",
    "Gsm8k",
    "Mix",
    "Overlong",
    "Pending",
    "Posed",
    "ReasoningGym",
    "Rows",
    "Sat",
    "Task",
    "create",
    "draw",
    "fitted",
    "member_of",
    "of",
    "settings_of",
    "split_of",
    "tagged",
    "untagged",
]

TASKS: dict[str, type[Arithmetic] | type[Sat]] = {"arithmetic": Arithmetic, "sat": Sat}
"""The tasks whose words the embedded model's tokenizer keeps whole; another one here is another tokenizer."""


def create(name: str, settings: dict[str, Any], named: Rewards | None = None) -> Task:
    """Return the task of this name with its own settings; `named` are the rewards of rows (None: the answer alone).

    Raises:
        ConfigError: there is no such task, or it refuses the settings.
    """
    if name.startswith(PREFIX):
        return ReasoningGym(name.removeprefix(PREFIX), settings)
    if name.startswith("python:"):
        return load_own(name, settings)
    if name == "gsm8k":
        return Gsm8k(**settings)
    if name == "rows":
        return Rows(RowsConfig(**settings), named)
    return TASKS[name](**settings)


def settings_of(config: Config, name: str) -> dict[str, Any]:
    """Return what the config's `data` says of the task of this name."""
    data = config.data
    if name.startswith(PREFIX):
        return dict(data.reasoning_gym)
    if name.startswith("python:"):
        return dict(data.settings)
    settings: dict[str, Any] = getattr(data, name).model_dump()
    return settings


def fitted(resolved: Resolved, *, trains: bool = True) -> Resolved:
    """Return the config with sizes that fit the rows that its task has; `trains`: whether they are trained on.

    Raises:
        ConfigError: as `of`.
    """
    resolved = fit(resolved, [*sizes.changes(resolved, trains)])
    task = of(resolved.config)
    if trains:
        require_scalable(resolved.config, task)
    return resolved


def require_scalable(config: Config, task: Task | None = None) -> None:
    """Raise ConfigError if the task says that it gives rewards which cannot be scaled as the config wants them.

    Args:
        task: the config's; None: it is made if it matters.
    """
    if not config.train.divides_by_mean or config.train.reward_weights:  # with these, the range is another one
        return
    low, _ = (task or of(config)).reward_range
    if low < 0:
        raise ConfigError(
            f"train.scale_rewards = 'mean': divides by a mean of rewards of 0 or more, and data.task = "
            f"{config.data.task!r} gives rewards down to {low:g}; allowed: another train.scale_rewards or task"
        )


def of(config: Config, folder: Path | None = None) -> Task:
    """Return the task that a run with this config has; texts that it cannot judge are kept in `folder`, the run's.

    Raises:
        ConfigError: a task cannot be made, or its rows are too few for the config's seeds.
    """
    data = config.data
    named = rewards.create(config, folder) if "rows" in data.tasks else None
    made: dict[str, Task] = {name: create(name, settings_of(config, name), named) for name in data.tasks}
    sizes.require(config)
    made = {
        name: Judged(task, name, folder) if folder is not None or name.startswith("python:") else task
        for name, task in made.items()
    }
    task = Mix(made, data.mix) if data.task == "mix" else made[data.task]
    limit, buffer, weights = config.generation.max_new_tokens, data.overlong_buffer, config.train.reward_weights
    if data.system_prompt is None and buffer == 0 and not weights:
        return task
    return Posed(task, data.system_prompt, Overlong(limit, buffer) if buffer else None, weights)
