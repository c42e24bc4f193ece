"""Start an inference server for a model and keep it until Ctrl-C: `make server`, or `python -m entrypoints.server`.

With `--print-command` it starts nothing: it prints the command that starts one, for a run with the same settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from grpo_mlflow.cli.command import importing, run, show
from grpo_mlflow.config import layers, parse_arguments, resolve

DEFAULTS = {"generation.backend": "vllm_server", "generation.server.manage": "true", "generation.server.port": "30000"}


def main(argv: Sequence[str]) -> None:
    words = "Serve model.train_id as generation.server says, with vLLM where generation.backend does not say otherwise."
    flags = {"print-command": "show the command that starts such a server by hand, and stop"}
    arguments = parse_arguments(argv, "server", words, flags=flags)
    given = layers.read(arguments.config) if arguments.config else {}
    kept = {key for key in DEFAULTS if given.get(key, ("local",))[0] not in ("local", False)}
    defaults = [f"{key}={value}" for key, value in DEFAULTS.items() if key not in kept]
    resolved = resolve(arguments.config, [*defaults, *arguments.overrides])
    if arguments.print_config:
        show(resolved)
        return
    with importing():
        from grpo_mlflow.runs import serve

    if "print-command" in arguments.flags:
        print(serve.command(resolved.config))
    else:
        serve.serve(resolved.config, Path("outputs/server.log").absolute())


if __name__ == "__main__":
    run(main)
