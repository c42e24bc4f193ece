"""A run that makes the embedded model."""

from __future__ import annotations

from pathlib import Path

from grpo_mlflow.config import Resolved
from grpo_mlflow.model import loading
from grpo_mlflow.runs import messages
from grpo_mlflow.runs.session import session


def warmup(resolved: Resolved) -> Path:
    """Make the embedded model of the config's task and return its folder."""
    with session(resolved, "warmup") as (processes, tracker, console):
        report = messages.warmup_progress(console)

        def progress(step: int, steps: int, loss: float) -> None:
            report(step, steps, loss)
            if step % 25 == 0 or step == steps:
                tracker.metrics({"warmup/loss": loss}, step)

        folder = Path(processes.one_after_first(lambda: loading.model_source("tiny", resolved.config, progress)))
        tracker.tags({"grpo.model_folder": str(folder)})
        console.say(f"model: {folder}")
    return folder
