"""Write an adapter and its base as one model: `python -m entrypoints.merge`. The command is `grpo_mlflow.cli.merge`."""

from grpo_mlflow.cli.merge import main

if __name__ == "__main__":
    from grpo_mlflow.cli.command import run

    run(main)
