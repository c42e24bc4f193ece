"""Whole tracked runs: train, evaluate, warm up."""

from grpo_mlflow.runs.evaluate import evaluate
from grpo_mlflow.runs.session import Nested, session
from grpo_mlflow.runs.train import Finished, Trial, train
from grpo_mlflow.runs.warmup import warmup

__all__ = ["Finished", "Nested", "Trial", "evaluate", "session", "train", "warmup"]
