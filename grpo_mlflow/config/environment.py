"""Settings that MLflow's own environment variables give where nobody chose a value."""

from __future__ import annotations

import os

from grpo_mlflow.config.layers import Layer

VARIABLES = {"tracking.experiment": "MLFLOW_EXPERIMENT_NAME", "tracking.run_name": "MLFLOW_RUN_NAME"}


def layer() -> Layer:
    """Return the settings whose variable is set and not empty."""
    found = {key: (os.environ.get(name), f"variable {name}") for key, name in VARIABLES.items()}
    return {key: (value, origin) for key, (value, origin) in found.items() if value}
