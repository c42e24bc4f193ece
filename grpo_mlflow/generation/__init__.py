"""Where completions come from."""

from grpo_mlflow.generation.base import (
    Begun,
    Generator,
    Overlapping,
    Pricing,
    Resting,
    Sampling,
    Streaming,
    Telling,
    training_sampling,
    weights,
)
from grpo_mlflow.generation.factory import Generators
from grpo_mlflow.generation.local.generator import LocalGenerator

__all__ = [
    "Begun",
    "Generator",
    "Generators",
    "LocalGenerator",
    "Overlapping",
    "Pricing",
    "Resting",
    "Sampling",
    "Streaming",
    "Telling",
    "training_sampling",
    "weights",
]
