"""Smoke test: two tiny iterations and an evaluation in a throw-away store, without a server."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from grpo_mlflow.cli.command import importing, require_loss, with_task
from grpo_mlflow.config import parse_arguments, resolve


def main(argv: Sequence[str]) -> None:
    arguments = parse_arguments(argv, "grpo smoke", "Check that everything is connected; nothing is kept.")
    with tempfile.TemporaryDirectory() as folder:
        store = f"tracking.uri=sqlite:///{folder}/mlflow.db"
        resolved = resolve(arguments.config or "smoke", [*arguments.overrides, store])
        resolved = with_task(resolved)
        require_loss(resolved)
        with importing():
            from grpo_mlflow import runs

        metrics = runs.train(resolved).run_dir / "metrics"
        for kind in ("train", "eval"):
            last: Path = max(metrics.glob(f"{kind}_iter_*.json"))
            print(f"{kind.capitalize()} metrics: {json.loads(last.read_text())}")
