"""Measure a model: `mlflow run . -e evaluate`. The command is `grpo evaluate`."""

from grpo_mlflow.cli.evaluate import main

if __name__ == "__main__":
    from grpo_mlflow.cli.command import run

    run(main)
