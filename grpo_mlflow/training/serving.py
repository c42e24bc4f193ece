"""How a run's model is asked outside of the run: as in its evaluations."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from grpo_mlflow.config import Config
from grpo_mlflow.model.servable import Serving
from grpo_mlflow.training.evaluation import evaluation_sampling


def of(config: Config, run_id: str = "", place: str = "") -> Serving:
    """Return how the model of a run is asked; `place` is its folder below the artifacts of the run."""
    name = config.model.train_id
    return Serving(
        defaults=asdict(evaluation_sampling(config)),
        system_prompt=config.data.system_prompt,
        run_id=run_id,
        place=place,
        source=Path(name).name if Path(name).is_dir() else name,  # whoever gets the folder need not know our paths
    )
