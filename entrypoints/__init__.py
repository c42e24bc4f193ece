"""Thin modules that MLproject starts; the commands are in `grpo_mlflow.cli`."""
