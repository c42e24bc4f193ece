"""Send what was kept while MLflow was away: `mlflow run . -e upload`, or `grpo upload`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from grpo_mlflow.cli.command import importing, show
from grpo_mlflow.config import parse_arguments, resolve
from grpo_mlflow.errors import ConfigError, UserError
from grpo_mlflow.runtime import interrupts

OPTIONS = {"folder": ("outputs", "folder with the files of runs; all below it is sent")}


def main(argv: Sequence[str]) -> None:
    arguments = parse_arguments(argv, "grpo upload", "Send what runs have kept while MLflow was away.", OPTIONS)
    resolved, folder = resolve(arguments.config, arguments.overrides), Path(arguments.options["folder"]).expanduser()
    if arguments.print_config:
        show(resolved)
        return
    if not folder.is_dir():
        raise ConfigError(f"folder = {str(folder)!r}: is no folder; allowed: one with the files of runs")
    with importing():
        from grpo_mlflow import tracking

    left = 0
    with interrupts.handled():
        for each in tracking.upload(resolved.config.tracking.uri, folder):
            print(f"run {each.run_id}: {each.sent} sent, {each.left} wait{f': {each.error}' if each.error else ''}")
            left += each.error is not None
    if left:
        raise UserError(f"{left} runs still wait for MLflow; the same command goes on")
    print("nothing waits for MLflow")
