"""Make the embedded model: `mlflow run . -e warmup`. The command is `grpo warmup`."""

from grpo_mlflow.cli.warmup import main

if __name__ == "__main__":
    from grpo_mlflow.cli.command import run

    run(main)
