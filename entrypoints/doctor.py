"""Check what a run needs: `python -m entrypoints.doctor`. The command is `grpo_mlflow.cli.doctor`."""

from grpo_mlflow.cli.doctor import main

if __name__ == "__main__":
    from grpo_mlflow.cli.command import run

    run(main)
