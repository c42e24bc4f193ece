"""Start an inference server for a model and keep it until Ctrl-C: `make server`, or `python -m entrypoints.server`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from grpo_mlflow.cli.command import importing, run, show
from grpo_mlflow.config import parse_arguments, resolve

DEFAULTS = ("generation.backend=vllm_server", "generation.server.manage=true", "generation.server.port=30000")


def main(argv: Sequence[str]) -> None:
    words = "Serve model.train_id as generation.server says, with vLLM where generation.backend does not say otherwise."
    arguments = parse_arguments(argv, "server", words)
    resolved = resolve(arguments.config, [*DEFAULTS, *arguments.overrides])
    if arguments.print_config:
        show(resolved)
        return
    with importing():
        from grpo_mlflow.runs.serve import serve

    serve(resolved.config, Path("outputs/server.log").absolute())


if __name__ == "__main__":
    run(main)
