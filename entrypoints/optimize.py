"""Search settings: `mlflow run . -e optimize`. The command is `grpo optimize`."""

from grpo_mlflow.cli.optimize import main

if __name__ == "__main__":
    from grpo_mlflow.cli.command import run

    run(main)
