"""Tasks: where problems come from and how answers are judged."""

from __future__ import annotations

from typing import Any

from grpo_mlflow.tasks.arithmetic import Arithmetic
from grpo_mlflow.tasks.base import Task
from grpo_mlflow.tasks.sat import Sat

__all__ = ["TASKS", "Arithmetic", "Sat", "Task", "create"]

TASKS: dict[str, type[Arithmetic] | type[Sat]] = {"arithmetic": Arithmetic, "sat": Sat}


def create(name: str, settings: dict[str, Any]) -> Task:
    """Return the task of this name with its own section of the config as keyword arguments."""
    return TASKS[name](**settings)
