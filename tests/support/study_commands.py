"""Commands that work on a study, each in a process of its own, and what they leave."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import mlflow
import optuna
import psutil
from mlflow.entities import Run
from optuna.trial import TrialState

from grpo_mlflow.search import study as studies
from tests.support.paths import ROOT
from tests.support.small_runs import SMALL
from tests.support.small_studies import STUDY


class Commands:
    """Starts commands in a folder, and leaves none of them running."""

    def __init__(self, folder: Path, store: str, environment: Mapping[str, str] | None = None) -> None:
        self._folder, self._store, self._environment = folder, store, environment or {}
        self._started: list[subprocess.Popen[str]] = []

    def start(self, words: Sequence[str], before: Sequence[str] = ("-m", "grpo_mlflow", "optimize")) -> int:
        """Start `optimize`; return its number, by which `output` and `end` know it."""
        output = self._folder / f"output-{len(self._started)}"
        with output.open("w") as stream:
            process = subprocess.Popen(
                [sys.executable, *before, *SMALL, *STUDY, f"tracking.uri={self._store}", *words],
                stdout=stream,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=self._folder,
                env={
                    **os.environ,
                    "PYTHONPATH": str(ROOT),
                    "PYTHONUNBUFFERED": "1",
                    "OMP_NUM_THREADS": "1",
                    **self._environment,
                },
            )
        self._started.append(process)
        return len(self._started) - 1

    def process(self, number: int) -> subprocess.Popen[str]:
        return self._started[number]

    def output(self, number: int) -> str:
        return (self._folder / f"output-{number}").read_text()

    def end(self, number: int) -> str:
        """Wait for its end, require success, and return what it said."""
        code = self._started[number].wait(timeout=240)
        assert code == 0, self.output(number)
        assert "Traceback" not in self.output(number)
        return self.output(number)

    def kill(self, number: int) -> None:
        self._started[number].kill()
        self._started[number].wait()

    def stop(self) -> None:
        for process in self._started:
            for each in _family(process.pid) if process.poll() is None else []:
                each.kill()
            process.wait()


def _family(pid: int) -> list[psutil.Process]:
    try:
        found = psutil.Process(pid)
        return [found, *found.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def nested_runs(store: str) -> tuple[list[Run], list[Run], list[Run]]:
    """Return the parents, the trials' runs and the evaluations of a store."""
    client = mlflow.MlflowClient(store)
    experiment = client.get_experiment_by_name("grpo").experiment_id
    found = client.search_runs([experiment], order_by=["start_time"])
    kinds = [[r for r in found if r.data.tags["grpo.kind"] == kind] for kind in ("optimize", "train", "evaluate")]
    return kinds[0], kinds[1], kinds[2]


def require_whole(store: str, study: optuna.Study, trials: int) -> None:
    """Require a study that ended as if nothing had happened: each place finished, one run each, none left open."""
    final = studies.final_trials(study)
    assert [trial.state for trial in final] == [TrialState.COMPLETE] * trials
    assert not study.get_trials(states=(TrialState.RUNNING, TrialState.WAITING))
    assert len({tuple(trial.params.items()) for trial in final}) == trials
    parents, trained, evaluated = nested_runs(store)
    assert len(parents) == 1
    assert {run.info.run_id for run in trained} == {trial.user_attrs[studies.RUN_ID] for trial in final}
    assert {run.data.tags["mlflow.parentRunId"] for run in [*trained, *evaluated]} == {parents[0].info.run_id}
    assert sum(run.info.run_name == "baseline" for run in evaluated) == 1
    states = {run.info.run_name: run.info.status for run in [*parents, *trained, *evaluated]}
    assert set(states.values()) == {"FINISHED"}, states
