"""Make the embedded model: `mlflow run . -e warmup`; training does it by itself when the cache lacks it."""

from __future__ import annotations

from collections.abc import Sequence

from grpo_mlflow.cli.command import importing, show, with_task
from grpo_mlflow.config import parse_arguments, resolve


def main(argv: Sequence[str]) -> None:
    arguments = parse_arguments(argv, "grpo warmup", "Make the embedded model of a task and cache it.")
    resolved = resolve(arguments.config, arguments.overrides)
    if arguments.print_config:
        show(resolved)
        return
    resolved = with_task(resolved)
    with importing():
        from grpo_mlflow import runs

    runs.warmup(resolved)
