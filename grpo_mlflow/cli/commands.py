"""The command `grpo NAME ...`, also `python -m grpo_mlflow NAME ...`: it runs `main` of the module of that name."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from grpo_mlflow.cli.command import run
from grpo_mlflow.errors import ConfigError

COMMANDS = {
    "train": "train a model, or go on with a run",
    "evaluate": "measure a model on the held-out problems",
    "optimize": "search settings with Optuna",
    "merge": "write an adapter and its base as one plain model",
    "doctor": "check what a run needs, with a remedy for what fails",
    "smoke": "two tiny iterations and an evaluation; nothing is kept",
    "server": "start an inference server for a model",
    "upload": "send what runs have kept while MLflow was away",
    "warmup": "keep the first weights of the embedded model",
}


def usage() -> str:
    """Return what `grpo --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        ["usage: grpo COMMAND [--config NAME|FILE] [KEY=VALUE ...]", "", *lines, "", "More: grpo COMMAND --help"]
    )


def main(argv: Sequence[str]) -> None:
    """Run the command that the first word names.

    Raises:
        ConfigError: there is no such command; and whatever the command raises.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return
    if argv[0] not in COMMANDS:
        raise ConfigError(f"grpo {argv[0]}: no such command; allowed: {', '.join(COMMANDS)}")
    command = importlib.import_module(f"grpo_mlflow.cli.{argv[0]}")
    command.main(argv[1:])


def entry() -> None:
    """Run the words of the command line, and exit."""
    run(main)
