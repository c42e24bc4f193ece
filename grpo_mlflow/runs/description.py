"""What MLflow shows of a run from its start: its settings, and the versions that it ran with."""

from __future__ import annotations

import math
import platform
from importlib.metadata import version as version_of

import torch

from grpo_mlflow import __version__, redaction
from grpo_mlflow.config import Config, Resolved, dump, flatten
from grpo_mlflow.runs import views
from grpo_mlflow.tasks import data_sets
from grpo_mlflow.tracking import Tracker

SETTINGS = "config/resolved.yaml"
"""The file of a run with all its settings."""


def describe(tracker: Tracker, resolved: Resolved, kind: str, resumed: bool) -> None:
    """Log what a run of this kind is; of a resumed one also what was overridden then."""
    described = resolved.config.model_copy(update={"resume": None})
    tracker.params(_parameters(described, kind))
    tracker.tags(_versions())
    tracker.text(SETTINGS, dump(described))
    if (digests := data_sets.digests(resolved.config)) is not None:
        tracker.tags({data_sets.TAG: digests})
    for used in data_sets.used(resolved.config, kind):
        tracker.data(used)
    for view in views.OF_KIND.get(kind, ()):
        tracker.view(view)
    if resumed:
        flat = redaction.without(flatten(described.model_dump()))
        changed = [f"{key}={flat[key]}" for key in _overridden(resolved)]
        tracker.tags({"grpo.resumed_with": " ".join(changed)})


def _parameters(config: Config, kind: str) -> dict[str, object]:
    """Return what MLflow shows of the config; lr on its log scale too, since the UI's axes are linear."""
    flat = flatten(config.model_dump(mode="json"))
    hidden = "resume" if kind == "optimize" else ("resume", "search.")
    shown = {key: value for key, value in flat.items() if not key.startswith(hidden)}
    return {**shown, "train.log10_lr": round(math.log10(config.train.lr), 6)}


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "accelerate", "mlflow")
    found = {f"version.{name}": version_of(name) for name in packages}
    return {
        **found,
        "version.grpo_mlflow": __version__,
        "version.python": platform.python_version(),
        "machine.threads": str(torch.get_num_threads()),  # bit-exact repetition needs the same number
    }


def _overridden(resolved: Resolved) -> list[str]:
    return [key for key, origin in resolved.origins.items() if origin == "override" and key != "resume"]
