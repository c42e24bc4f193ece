"""Merge a LoRA adapter into its base model: `mlflow run . -e merge -P model=RUN_ID -P output=FOLDER`."""

from __future__ import annotations

from collections.abc import Sequence

from grpo_mlflow.cli.command import importing
from grpo_mlflow.config import parse_arguments
from grpo_mlflow.errors import ConfigError

OPTIONS = {
    "model": ("", "run id, checkpoint folder or adapter folder"),
    "checkpoint": ("best", "of a run: best, last, or a name such as iter_020"),
    "output": ("", "folder to write the plain model to; must not exist"),
}


def main(argv: Sequence[str]) -> None:
    arguments = parse_arguments(argv, "grpo merge", "Write an adapter and its base as one plain model.", OPTIONS)
    missing = [name for name in ("model", "output") if not arguments.options[name]]
    if missing:
        raise ConfigError(f"{missing[0]} = '': expected --{missing[0]}; {OPTIONS[missing[0]][1]}")
    with importing():
        from grpo_mlflow.model import loading
        from grpo_mlflow.runs import preflight, stored
        from grpo_mlflow.training import serving

    model, checkpoint, output = (arguments.options[name] for name in OPTIONS)
    resolved, source = stored.resolve_evaluation(arguments, model, checkpoint)
    config = resolved.config
    print(f"model: {loading.merge(source, output, config.model, preflight.require_any, serving.of(config))}")
