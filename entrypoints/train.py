"""Train a model: `python -m entrypoints.train`. The command is `grpo_mlflow.cli.train`."""

from grpo_mlflow.cli.train import main

if __name__ == "__main__":
    from grpo_mlflow.cli.command import run

    run(main)
