"""Search settings: `python -m entrypoints.optimize`. The command is `grpo_mlflow.cli.optimize`."""

from grpo_mlflow.cli.optimize import main

if __name__ == "__main__":
    from grpo_mlflow.cli.command import run

    run(main)
