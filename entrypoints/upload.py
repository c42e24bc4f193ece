"""Send what MLflow has missed: `mlflow run . -e upload`. The command is `grpo upload`."""

from grpo_mlflow.cli.upload import main

if __name__ == "__main__":
    from grpo_mlflow.cli.command import run

    run(main)
