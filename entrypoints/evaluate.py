"""Measure a model: `python -m entrypoints.evaluate`. The command is `grpo_mlflow.cli.evaluate`."""

from grpo_mlflow.cli.evaluate import main

if __name__ == "__main__":
    from grpo_mlflow.cli.command import run

    run(main)
