"""Settings of tasks that contradict each other or name what is not there, told without importing a task."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from importlib.util import find_spec

from pydantic import TypeAdapter, ValidationError

from grpo_mlflow.config.schema import TASK_NAMES, Config, RowsConfig, TaskName

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_EXAMPLE = "data.mix='{arithmetic: 0.7, sat: 0.3}'"


def errors(config: Config) -> Iterator[str]:
    """Yield one line per mistake: the key, its value and what is allowed."""
    data = config.data
    if data.task == "mix" and not data.mix:
        yield f"data.mix = {{}}: data.task = 'mix' needs tasks with their weights; allowed: {_EXAMPLE}"
    for name in data.mix:
        try:
            valid = TypeAdapter(TaskName).validate_python(name) != "mix"
        except ValidationError:
            valid = False
        if not valid:
            yield f"data.mix = {data.mix}: {name!r} is no task; allowed: {TASK_NAMES}, without 'mix'"
    if any(name.startswith("reasoning_gym/") for name in data.tasks) and find_spec("reasoning_gym") is None:
        yield (
            f"data.task = {data.task!r}: the package reasoning-gym is not installed; allowed: after "
            "pip install 'reasoning-gym>=0.1.25'"
        )
    if "gsm8k" in data.tasks:
        yield from _gsm8k(data.gsm8k.path)
    if "rows" in data.tasks:
        yield from _rows(data.rows)
    yield from _rewards(config)
    limit = config.generation.max_new_tokens
    if data.overlong_buffer > limit:
        yield (
            f"data.overlong_buffer = {data.overlong_buffer}: more than generation.max_new_tokens = {limit}; allowed: "
            f"0 to {limit}"
        )
    if data.overlong_buffer and config.train.divides_by_mean:
        yield (
            f"data.overlong_buffer = {data.overlong_buffer}: makes rewards below 0, and train.scale_rewards = 'mean' "
            "divides by a mean of rewards of 0 or more; allowed: 0, or another train.scale_rewards"
        )


def idle(config: Config, keys: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """Yield the keys of each task that no problem comes from."""
    tasks = config.data.tasks
    sections = {name: f"data.{name}." for name in ("arithmetic", "sat", "gsm8k", "rows") if name not in tasks}
    for prefix in sections.values():
        yield tuple(key for key in keys if key.startswith(prefix))
    for key, prefix in (("data.reasoning_gym", "reasoning_gym/"), ("data.settings", "python:")):
        if not any(name.startswith(prefix) for name in tasks):
            yield (key,)
    if not config.data.rewards:
        yield ("data.reward_timeout",)
    if config.data.task != "mix":
        yield ("data.mix",)


def _rewards(config: Config) -> Iterator[str]:
    data = config.data
    if "rows" not in data.tasks:
        if data.rewards:
            named = ", ".join(data.rewards)
            yield (
                f"data.rewards = {{{named}}}: data.task = {data.task!r} judges by itself; allowed: {{}}, or task rows"
            )
        if config.train.multi_objective_aggregation != "sum_then_normalize":
            key = "train.multi_objective_aggregation"
            yield f"{key} = 'normalize_then_sum': there is one reward; allowed: sum_then_normalize, or data.rewards"
    names = [name.rpartition(":")[2] for name in data.rewards]
    for name in config.train.reward_weights:
        if name not in names:
            yield f"train.reward_weights = {config.train.reward_weights}: there is no reward {name!r}; allowed: {names}"
    if data.success is not None and not data.rewards:
        yield "data.success: there are no data.rewards to name one of; allowed: null, or with data.rewards"


def _gsm8k(path: str | None) -> Iterator[str]:
    if path is None:
        if find_spec("datasets") is None:
            yield (
                "data.gsm8k.path = null: openai/gsm8k comes from the hub through the package datasets, which is not "
                "installed; allowed: a folder or file (parquet or jsonl), or null after pip install datasets"
            )
    elif not os.path.exists(os.path.expanduser(path)):
        yield f"data.gsm8k.path = {path!r}: no such folder or file; allowed: one with parquet or jsonl, or null"


def _rows(rows: RowsConfig) -> Iterator[str]:
    for key, path in (("data.rows.path", rows.path), ("data.rows.eval_path", rows.eval_path)):
        if path is None or os.path.exists(os.path.expanduser(path)):
            continue
        if not _HUB_ID.fullmatch(path):
            yield (
                f"{key} = {path!r}: no such folder or file; allowed: one with jsonl, json, csv or parquet, or a hub id"
            )
        elif find_spec("datasets") is None:
            yield (
                f"{key} = {path!r}: no such folder or file; a data set of the hub needs the package datasets, which is "
                "not installed; allowed: a folder or file, or after pip install datasets a hub id"
            )
