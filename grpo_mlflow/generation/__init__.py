"""Where completions come from."""

from grpo_mlflow.generation.base import Generator, Sampling
from grpo_mlflow.generation.local import LocalGenerator

__all__ = ["Generator", "LocalGenerator", "Sampling"]
