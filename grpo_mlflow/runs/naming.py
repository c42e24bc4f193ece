"""What runs are called in MLflow, from what they are: `arithmetic tiny lr=3e-4`, `eval of NAME@iter_020`, `trial 3`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_mlflow.config import TRAITS, Config, Resolved, flatten

_MOST_SETTINGS = 4
_LONGEST = 20  # characters of a value; a longer one says nothing in a list
_SAID = {"train.lr", "model.train_id", "data.task", "data.rows.path"}  # elsewhere in the name


def of_run(resolved: Resolved, kind: str) -> str:
    """Return the name of a run of this kind; of `train` with what it was given beside the defaults of its config."""
    config = resolved.config
    if kind == "optimize":
        return config.search.study_name
    what = f"{_task(config)} {model(config.model.train_id)}"
    if kind != "train":
        return f"{kind} {what}"
    return f"{what} {settings({'train.lr': config.train.lr, **_chosen(resolved)})}"


def of_trial(number: int, values: Mapping[str, Any]) -> str:
    """Return the name of a trial with these values of what the study varies."""
    return f"trial {number} {settings(values)}".rstrip()


def of_evaluation(model_name: str, checkpoint: str | None = None) -> str:
    """Return the name of an evaluation of a model, or of a checkpoint of the run of that name."""
    return f"eval of {model_name}@{checkpoint}" if checkpoint else f"eval of {model_name}"


def model(source: str | Path) -> str:
    """Return the last part of a hub id or path."""
    path = Path(str(source).rstrip("/"))
    return path.name or str(source)


def settings(values: Mapping[str, Any]) -> str:
    """Return settings by the last part of their keys, the first few of them: `lr=3e-4 kl_coef=0`."""
    words = [f"{key.rpartition('.')[2]}={value(each)}" for key, each in values.items()]
    more = [f"and {len(words) - _MOST_SETTINGS} more"] if len(words) > _MOST_SETTINGS else []
    return " ".join([*words[:_MOST_SETTINGS], *more])


def value(of: Any) -> str:
    """Return a value as short as it can be read: .0003 as 3e-4."""
    if isinstance(of, float) and of != 0 and math.isfinite(of) and not 0.01 <= abs(of) < 1e5:
        digits, exponent = f"{of:.3e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    text = f"{of:.4g}" if isinstance(of, float) else str(of)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _task(config: Config) -> str:
    if config.data.task == "rows" and config.data.rows.path:
        return Path(config.data.rows.path.rstrip("/")).stem
    return config.data.task.rpartition(":")[2].rpartition("/")[2]


def _chosen(resolved: Resolved) -> dict[str, Any]:
    """Return what was given beside the config and can change the result."""
    flat = flatten(resolved.config.model_dump(mode="json"))
    given = [key for key, origin in resolved.origins.items() if origin.startswith("override") and key in flat]
    return {
        key: flat[key] for key in given if TRAITS[key].compared and key not in _SAID and not key.startswith("eval.")
    }
