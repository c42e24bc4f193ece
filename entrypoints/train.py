"""Train a model: `mlflow run . -e train`. The command is `grpo train`."""

from grpo_mlflow.cli.train import main

if __name__ == "__main__":
    from grpo_mlflow.cli.command import run

    run(main)
