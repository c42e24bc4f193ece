"""Train: `mlflow run . -e train`, or `python -m entrypoints.train train.lr=1e-5`."""

from __future__ import annotations

from collections.abc import Sequence

from grpo_mlflow.cli.command import importing, require_loss, run, show, with_task
from grpo_mlflow.config import parse_arguments, resolve


def main(argv: Sequence[str]) -> None:
    arguments = parse_arguments(argv, "train", "Train a model with GRPO; resume=RUN_ID continues a run.")
    # torch and MLflow are imported only once the settings are known to be right
    if resume := arguments.resumes():
        with importing():
            from grpo_mlflow.runs.stored import resolve_training

        resolved, stored = resolve_training(arguments, resume)
    else:
        resolved, stored = resolve(arguments.config, arguments.overrides), None
    if arguments.print_config:
        show(resolved)
        return
    resolved.require_trainable()
    resolved = with_task(resolved)
    require_loss(resolved)
    with importing():
        from grpo_mlflow import runs

    runs.train(resolved, stored)


if __name__ == "__main__":
    run(main)
