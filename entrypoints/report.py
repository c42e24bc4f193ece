"""Write a report again: `python -m entrypoints.report --run RUN_ID`. The command is `grpo_mlflow.cli.report`."""

from grpo_mlflow.cli.report import main

if __name__ == "__main__":
    from grpo_mlflow.cli.command import run

    run(main)
