"""Thin modules that MLproject and launchers start; the commands are in `grpo_mlflow.cli`."""
