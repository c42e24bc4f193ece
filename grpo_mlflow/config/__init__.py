"""Typed configuration: presets and files, dotted overrides, checks. Importing it stays fast: no torch, no MLflow."""

from grpo_mlflow.config.adapt import Change
from grpo_mlflow.config.command import Arguments, parse_arguments
from grpo_mlflow.config.keys import ENTRIES, OF_EVALUATION, TRAITS, flatten, nest, renamed, summary
from grpo_mlflow.config.layers import presets
from grpo_mlflow.config.mistakes import Mistakes
from grpo_mlflow.config.overrides import parse_overrides, split_overrides
from grpo_mlflow.config.resolve import Resolved, dump, fitted, is_free, overlay, render, resolve
from grpo_mlflow.config.schema import (
    Config,
    GenerationConfig,
    LoraConfig,
    ModelConfig,
    ServerConfig,
    SyncName,
    TinyConfig,
    TrainConfig,
)

__all__ = [
    "ENTRIES",
    "OF_EVALUATION",
    "TRAITS",
    "Arguments",
    "Change",
    "Config",
    "GenerationConfig",
    "LoraConfig",
    "Mistakes",
    "ModelConfig",
    "Resolved",
    "ServerConfig",
    "SyncName",
    "TinyConfig",
    "TrainConfig",
    "dump",
    "fitted",
    "flatten",
    "is_free",
    "nest",
    "overlay",
    "parse_arguments",
    "parse_overrides",
    "presets",
    "renamed",
    "render",
    "resolve",
    "split_overrides",
    "summary",
]
