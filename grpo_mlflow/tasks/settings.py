"""What decides a task's problems."""

from __future__ import annotations

from typing import Any

from grpo_mlflow import tasks
from grpo_mlflow.config import Config
from grpo_mlflow.tasks import table


def task_settings(config: Config) -> dict[str, Any]:
    """Return what, beside the task's name, decides its problems and prompts: equal settings, equal problems."""
    data = config.data
    settings = tasks.settings_of(config, data.task) if data.task != "mix" else {"mix": data.mix}
    for name in data.mix if data.task == "mix" else ():
        settings[name] = tasks.settings_of(config, name)
    if "rows" in data.tasks:  # another file under the same name makes other problems
        settings = {**settings, "digests": dict(table.load(data.rows).digests)}
    if data.task.startswith("python:"):
        settings = {"class": data.task, "settings": settings}
    return settings if data.system_prompt is None else {**settings, "system_prompt": data.system_prompt}
