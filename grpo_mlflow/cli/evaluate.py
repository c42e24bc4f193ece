"""Evaluate: `mlflow run . -e evaluate -P model=RUN_ID`, or `grpo evaluate --model FOLDER`."""

from __future__ import annotations

from collections.abc import Sequence

from grpo_mlflow.cli.command import importing, show, with_task
from grpo_mlflow.config import parse_arguments, resolve

OPTIONS = {
    "model": ("", "run id, checkpoint or model folder, or hub id; empty: model.train_id"),
    "checkpoint": ("best", "of a run: best, last, or a name such as iter_020"),
}


def main(argv: Sequence[str]) -> None:
    arguments = parse_arguments(argv, "grpo evaluate", "Measure a model on held-out problems.", OPTIONS)
    if arguments.options["model"]:
        with importing():
            from grpo_mlflow.runs import stored

        resolved, source = stored.resolve_evaluation(arguments, **arguments.options)
    else:
        resolved, source = resolve(arguments.config, arguments.overrides), ""
    if arguments.print_config:
        show(resolved)
        return
    resolved = with_task(resolved, trains=False)
    with importing():
        from grpo_mlflow import runs

    runs.evaluate(resolved, source)
