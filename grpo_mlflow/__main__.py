"""`python -m grpo_mlflow train ...` is `grpo train ...`, for launchers that start modules."""

from grpo_mlflow.cli.commands import entry

if __name__ == "__main__":
    entry()
