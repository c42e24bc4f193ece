"""Make the embedded model: `python -m entrypoints.warmup`. The command is `grpo_mlflow.cli.warmup`."""

from grpo_mlflow.cli.warmup import main

if __name__ == "__main__":
    from grpo_mlflow.cli.command import run

    run(main)
