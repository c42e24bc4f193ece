"""Rewards of a config without its rows: problems are made here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo_mlflow.config import resolve
from grpo_mlflow.tasks import rewards
from grpo_mlflow.types import Problem, Verdict


def rewards_of(named: dict[str, Any], folder: Path | None = None, *overrides: str) -> rewards.Rewards:
    """Return what `data.rewards` of these names gives."""
    words = ["data.task=rows", "data.rows.path=.", f"data.rewards={json.dumps(named)}", *overrides]
    found = rewards.create(resolve("tiny", words).config, folder)
    assert found is not None
    return found


def problem(prompt: str | list[dict[str, str]] = "1 + 1 =", seed: int = 0, **columns: Any) -> Problem:
    """Return the problem of a row."""
    chat = not isinstance(prompt, str)
    messages = tuple(prompt) if isinstance(prompt, list) else ({"role": "user", "content": prompt},)
    answer = columns.get("answer")
    payload = {"columns": {"prompt": prompt, **columns}, "answer": answer, "conversational": chat}
    return Problem(f"rows/train/{seed}", seed, messages, payload)


def values(found: Sequence[Verdict], name: str) -> list[float | None]:
    return [(verdict.values or {})[name] for verdict in found]
