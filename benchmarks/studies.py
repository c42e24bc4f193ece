"""Is pruning worth it on real studies? The default study with and without a pruner, for several seeds.

    python -m benchmarks.studies --output benchmarks/results/studies.json      # about 14 minutes a seed on two cores

For each: iterations trained and tokens sampled by all trials, wall time, the winner's score in the search and on fresh
problems, and the same with pruning over without.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlflow

_ROOT = Path(__file__).resolve().parent.parent


def run(folder: Path, words: list[str]) -> dict[str, Any]:
    """Run one `optimize` command in an empty folder; return what its study says."""
    began = time.perf_counter()
    with (folder / "log.txt").open("w") as log:
        subprocess.run(
            [sys.executable, "-m", "grpo_mlflow", "optimize", *words],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(_ROOT)},
            stdout=log,
            stderr=subprocess.STDOUT,
            check=True,
        )
    seconds = time.perf_counter() - began
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("grpo")
    (parent,) = client.search_runs([experiment.experiment_id], "tags.`grpo.kind` = 'optimize'")
    table = Path(parent.info.artifact_uri) / "study" / "trials.csv"
    trials = list(csv.DictReader(table.read_text().splitlines()))
    ran = [trial for trial in trials if not trial["duplicate_of"]]
    metrics = parent.data.metrics
    return {
        "seconds": seconds,
        "trials": len(trials),
        "pruned": sum(trial["state"] == "PRUNED" for trial in trials),
        "iterations": sum(int(trial["last_step"] or 0) for trial in ran),
        "tokens": sum(int(trial["tokens"] or 0) for trial in ran),
        "training_seconds": sum(float(trial["seconds"] or 0) for trial in ran),
        "selected": metrics["study/selected_pass_at_1"],
        "confirmed": metrics["study/confirmed_pass_at_1"],
        "confirmed_low": metrics["study/confirmed_pass_at_1_low"],
        "confirmed_high": metrics["study/confirmed_pass_at_1_high"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pruners", nargs="+", default=["paired", "none"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--output", type=Path, help="where to write the table as JSON")
    parser.add_argument("words", nargs="*", help="further overrides")
    arguments = parser.parse_args()
    table = []
    for seed in arguments.seeds:
        for pruner in arguments.pruners:
            with tempfile.TemporaryDirectory() as folder:
                record = run(Path(folder), [f"search.pruner={pruner}", f"seed={seed}", *arguments.words])
            table.append({"pruner": pruner, "seed": seed, **record})
            print(
                f"seed {seed}  {pruner:<10} {record['pruned']:>2} of {record['trials']} pruned  "
                f"{record['iterations']:>5} iterations  {record['tokens']:>8} tokens  {record['seconds']:.0f} s  "
                f"confirmed {record['confirmed']:.3f} [{record['confirmed_low']:.3f}, {record['confirmed_high']:.3f}]",
                flush=True,
            )
    if arguments.output:
        arguments.output.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
