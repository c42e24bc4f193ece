"""Write an adapter and its base as one model: `mlflow run . -e merge`. The command is `grpo merge`."""

from grpo_mlflow.cli.merge import main

if __name__ == "__main__":
    from grpo_mlflow.cli.command import run

    run(main)
