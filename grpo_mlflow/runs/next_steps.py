"""Commands that look at a run and go on from it, as messages, descriptions and reports show them."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from grpo_mlflow.config import Config
from grpo_mlflow.program import program
from grpo_mlflow.redaction import redact
from grpo_mlflow.tracking import Tracker

_UI = "http://127.0.0.1:5000"  # where `mlflow ui` serves


@dataclass(frozen=True, slots=True)
class Place:
    """A run: its id, the folder of its files, the address of its store (None in a process that writes to none)."""

    run_id: str
    folder: Path
    url: str | None

    @classmethod
    def of(cls, tracker: Tracker) -> Place:
        return cls(tracker.run_id, tracker.run_dir, tracker.url)


def resume(config: Config, place: Place) -> str:
    """Return the command that goes on with a training run."""
    return f"{program()} train resume={place.run_id}{store(config, place.url)}"


def longer(config: Config, place: Place, most: int | None = None) -> str | None:
    """Return the command that trains twice as long, or for `most` iterations; None where that is no longer."""
    done = config.train.iterations
    found = 2 * done if most is None else min(2 * done, most)
    return f"{resume(config, place)} train.iterations={found}" if found > done else None


def measure(model: str, config: Config, url: str | None, checkpoint: str | None = None) -> str:
    """Return the command that measures a run's checkpoint (by default its best one), or another model."""
    which = f" --checkpoint {checkpoint}" if checkpoint else ""
    return f"{program()} evaluate --model {shlex.quote(model)}{which}{store(config, url)}"


def measure_on_others(model: str, config: Config, url: str | None) -> str:
    """Return the command that measures a model on problems that have chosen nothing."""
    return f"{measure(model, config, url)} eval.id_seed_start=60000"


def train_with(settings: Path, config: Config, url: str | None, seed: int) -> str:
    """Return the command that trains with the settings in a file, and a seed."""
    return f"{program()} train --config {shlex.quote(str(settings))} seed={seed}{store(config, url)}"


def looking(url: str | None, page: str = "") -> list[str]:
    """Return how to look at a page of MLflow: its address, below the command that serves it if nothing does yet."""
    shown = redact(url or "")
    if shown.startswith("http"):
        return [f"{shown.rstrip('/')}/{page}"]
    return [f"{program('mlflow', 'mlflow')} ui --backend-store-uri {shlex.quote(shown)}", f"{_UI}/{page}"]


def store(config: Config, url: str | None) -> str:
    """Return the setting that finds the store again, with a space before it; empty where the environment names it.

    `mlflow run` has told its own to this process alone.
    """
    uri = url if "MLFLOW_RUN_ID" in os.environ else config.tracking.uri
    return f" {word('tracking.uri', uri)}" if uri else ""


def word(key: str, value: str) -> str:
    """Return `key=value` as a shell takes it; a reference to a variable is left to us."""
    return shlex.quote(f"{key}={redact(value)}")
