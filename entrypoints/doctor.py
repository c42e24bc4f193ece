"""Check what a run needs: `mlflow run . -e doctor`. The command is `grpo doctor`."""

from grpo_mlflow.cli.doctor import main

if __name__ == "__main__":
    from grpo_mlflow.cli.command import run

    run(main)
