"""Start an inference server: `python -m entrypoints.server`. The command is `grpo_mlflow.cli.server`."""

from grpo_mlflow.cli.server import main

if __name__ == "__main__":
    from grpo_mlflow.cli.command import run

    run(main)
