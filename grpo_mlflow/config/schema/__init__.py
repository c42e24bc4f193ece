"""Every setting: its type, its default and its range. One module per section, one class per YAML mapping.

The defaults are those of the guide's set-up (a 1.5B model and a server); the preset `tiny` turns them into a run for
a laptop. Fields are strict (the text "8" is not a number) and frozen.
"""

from grpo_mlflow.config.schema.config import Config
from grpo_mlflow.config.schema.data import (
    TASK_NAMES,
    ArithmeticConfig,
    DataConfig,
    Gsm8kConfig,
    RowsConfig,
    SatConfig,
    TaskName,
)
from grpo_mlflow.config.schema.eval import EvalConfig
from grpo_mlflow.config.schema.generation import Backend, GenerationConfig, ServerConfig, SyncName
from grpo_mlflow.config.schema.model import LoraConfig, ModelConfig, TinyConfig
from grpo_mlflow.config.schema.search import SearchConfig
from grpo_mlflow.config.schema.tracking import CheckpointConfig, TrackingConfig
from grpo_mlflow.config.schema.train import TrainConfig

__all__ = [
    "TASK_NAMES",
    "ArithmeticConfig",
    "Backend",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "GenerationConfig",
    "Gsm8kConfig",
    "LoraConfig",
    "ModelConfig",
    "RowsConfig",
    "SatConfig",
    "SearchConfig",
    "ServerConfig",
    "SyncName",
    "TaskName",
    "TinyConfig",
    "TrackingConfig",
    "TrainConfig",
]
