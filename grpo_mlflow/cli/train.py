"""Train: `mlflow run . -e train`, or `grpo train train.lr=1e-5`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from grpo_mlflow.cli.command import importing, require_all, require_loss, show, with_task
from grpo_mlflow.config import Resolved, parse_arguments, resolve

if TYPE_CHECKING:
    from grpo_mlflow.runs.stored import Stored


def checked(argv: Sequence[str]) -> tuple[Resolved, Stored | None] | None:
    """Return what is to be trained, and where a resumed run stands; None where only the settings were to be shown.

    Raises:
        UserError: a setting is wrong, or there is no such run.
    """
    arguments = parse_arguments(argv, "grpo train", "Train a model with GRPO; resume=RUN_ID continues a run.")
    # torch and MLflow are imported only once the settings are known to be right
    if resume := arguments.resumes():
        with importing():
            from grpo_mlflow.runs.stored import resolve_training

        resolved, stored = resolve_training(arguments, resume)
    else:
        resolved, stored = resolve(arguments.config, arguments.overrides), None
    if arguments.print_config:
        show(resolved)
        return None
    return require_all(resolved, Resolved.require_trainable, with_task, require_loss), stored


def main(argv: Sequence[str]) -> None:
    if (found := checked(argv)) is None:
        return
    with importing():
        from grpo_mlflow import runs

    runs.train(*found)
