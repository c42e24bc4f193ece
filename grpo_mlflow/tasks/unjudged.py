"""Texts that could not be judged, kept for who looks for the reason."""

from __future__ import annotations

import re
from pathlib import Path

from grpo_mlflow.errors import one_line
from grpo_mlflow.runtime.files import write_whole
from grpo_mlflow.types import Problem


def keep(folder: Path | None, problem: Problem, text: str) -> str:
    """Write a text under `folder`, and return where it is, as the end of a line; empty without a folder."""
    if folder is None:
        return ""
    name = re.sub(r"[^\w.-]+", "_", str(problem.id))[-100:]
    path = folder / f"{name}-{problem.seed}.txt"
    try:
        # half of a surrogate pair, which a model may write, is escaped: no file can hold it
        write_whole(path, text.encode(errors="backslashreplace").decode())
    except OSError as error:
        return f"; the text could not be kept: {one_line(error)}"
    return f"; the text is in {path}"
