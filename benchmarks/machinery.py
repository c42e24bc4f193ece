"""What does a study cost beside its training? Optuna, MLflow and the report, on trials that train nothing.

    python -m benchmarks.machinery --output benchmarks/results/machinery.json        # some minutes
    python -m benchmarks.machinery --trials 10 100 --trial_seconds 30

Each stub trial opens an MLflow run of its own and logs what a trial of the preset `tiny` logs: its settings,
80 iterations of metrics with their files, 9 evaluations of 256 problems with their tables and reports. Printed: seconds
per trial after 10, 100 and 1000 of them in one study, and the share of a real trial's time (`--trial_seconds`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from grpo_mlflow import runs
from grpo_mlflow.config import Resolved, resolve
from grpo_mlflow.runs.stored import Stored
from grpo_mlflow.runtime.console import Console
from grpo_mlflow.search import report, space_file
from grpo_mlflow.search import study as studies
from grpo_mlflow.search.storage import open_storage
from grpo_mlflow.search.trials import Search
from grpo_mlflow.training import evaluation
from grpo_mlflow.training.checkpoint import name_of
from grpo_mlflow.training.evaluation import Evaluation, Outcome
from grpo_mlflow.training.progress import Progress
from grpo_mlflow.types import Completion, Prompt, Rollout, Verdict

_TRAIN_METRICS = 30


def _evaluation(rng: np.random.Generator, chance: float, problems: int, replicates: int) -> Evaluation:
    outcomes = []
    for number in range(problems):
        prompt = Prompt(f"stub/eval/{number}", ({"role": "user", "content": "12+34="},), (1, 2, 3))
        rollouts = [
            Rollout(
                prompt,
                Completion((4, 5, 6), "46", (-0.1, -0.1, -0.1), "stop", 0),
                Verdict(float(right), {"correct": float(right)}, bool(right), "46"),
            )
            for right in rng.random(replicates) < chance
        ]
        outcomes.append(Outcome(prompt.problem_id, tuple(rollouts), rollouts[0], 0.0))
    return Evaluation(tuple(outcomes), (1, 4))


class Stub:
    """Logs what a training run logs, and learns nothing. `spent` is its own work, which is no cost of the machinery."""

    def __init__(self) -> None:
        self.spent = 0.0

    def __call__(self, resolved: Resolved, stored: Stored | None, trial: runs.Trial) -> None:
        config, rng = resolved.config, np.random.default_rng()
        skill = rng.uniform(0.5, 0.95)
        progress = Progress()
        with runs.session(resolved, "train", stored, trial.nested) as (_, tracker, _console):
            trial.on_start(tracker.run_id)
            for version in range(config.train.iterations + 1):
                if version % config.eval.interval == 0:
                    began = time.perf_counter()
                    chance = 0.5 + (skill - 0.5) * version / config.train.iterations
                    found = _evaluation(rng, chance, config.eval.num_ids, config.eval.replicates)
                    self.spent += time.perf_counter() - began
                    evaluation.track(tracker, found, version, 0.0, config.tracking.samples)
                    progress = dataclasses.replace(progress, iteration=version, tokens=1000 * version)
                    assert trial.on_evaluation is not None
                    trial.on_evaluation(progress, found)
                tracker.metrics({f"train/stub_{i}": float(version) for i in range(_TRAIN_METRICS)}, version)
                tracker.text(f"metrics/train_{name_of(version)}.json", json.dumps({"iteration": version}))


def measure(folder: Path, marks: list[int]) -> list[dict[str, Any]]:
    """Run one study of stub trials; return a record at each mark."""
    resolved = resolve(
        "tiny",
        [
            f"tracking.uri=sqlite:///{folder}/mlflow.db",
            f"search.storage=sqlite:///{folder}/optuna.db",
            f"search.n_trials={max(marks)}",
            "search.pruner=paired",
            "search.sampler=tpe",
        ],
    )
    config = resolved.config
    space = space_file.load(config.search.space, resolved)
    storage = open_storage(config.search.storage)
    study = studies.open_study(storage, config, space)
    queue = studies.Queue(study, storage, config, space)
    stub, table = Stub(), []
    with runs.session(resolved, "optimize") as (_, tracker, _console):
        work = Search(resolved, space, study, queue, tracker.run_id, Console(quiet=True), train=stub)
        began, last, before = time.perf_counter(), 0.0, 0

        def between() -> None:
            nonlocal last, before
            ended = sum(trial.state.is_finished() for trial in studies.final_trials(study))
            if ended in marks and ended > before:
                spent = time.perf_counter() - began - stub.spent
                started = time.perf_counter()
                trials = studies.final_trials(study)[:ended]
                tracker.text("study/report.html", report.page(study, 1, trials, max(marks), [], None))
                page = time.perf_counter() - started
                stub.spent += page  # it is made once per study, and told apart
                table.append(
                    {
                        "trials": ended,
                        "seconds_per_trial": (spent - last) / (ended - before),
                        "pruned": sum(t.state.name == "PRUNED" for t in trials),
                        "report_seconds": page,
                    }
                )
                last, before = spent, ended
                print(
                    f"{ended:>5} trials  {table[-1]['seconds_per_trial']:.3f} s per trial since the line above  "
                    f"report {page:.1f} s",
                    flush=True,
                )

        work.run(between)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--trial_seconds", type=float, default=30.0, help="what a real trial takes, for the share")
    parser.add_argument("--output", type=Path, help="where to write the table as JSON")
    arguments = parser.parse_args()
    output = arguments.output.absolute() if arguments.output else None
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        table = measure(Path(folder), sorted(arguments.trials))
    first = table[0]
    share = (first["seconds_per_trial"] + first["report_seconds"] / first["trials"]) / arguments.trial_seconds
    print(f"share of a real trial of {arguments.trial_seconds:g} s: {share:.1%}")
    if output:
        output.write_text(json.dumps({"share": share, "table": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
