"""Send what MLflow has missed: `python -m entrypoints.upload`. The command is `grpo_mlflow.cli.upload`."""

from grpo_mlflow.cli.upload import main

if __name__ == "__main__":
    from grpo_mlflow.cli.command import run

    run(main)
