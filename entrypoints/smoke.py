"""Check that everything is connected: `python -m entrypoints.smoke`. The command is `grpo_mlflow.cli.smoke`."""

from grpo_mlflow.cli.smoke import main

if __name__ == "__main__":
    from grpo_mlflow.cli.command import run

    run(main)
