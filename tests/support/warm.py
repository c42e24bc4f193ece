"""Imports what commands use, in the process that those of a test are forked from."""

from __future__ import annotations

import grpo_mlflow.cli.evaluate
import grpo_mlflow.cli.optimize
import grpo_mlflow.cli.train
import grpo_mlflow.runs
import grpo_mlflow.runs.stored
import grpo_mlflow.search.optimize
import grpo_mlflow.search.storage  # noqa: F401
