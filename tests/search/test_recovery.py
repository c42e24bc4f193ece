"""A study that is interrupted or killed and continued proposes and prunes as one that nobody disturbed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
from optuna.trial import FrozenTrial, TrialState

from grpo_mlflow import runs, seeding
from grpo_mlflow.config import Resolved
from grpo_mlflow.runtime.console import Console
from grpo_mlflow.search import space_file
from grpo_mlflow.search import study as studies
from grpo_mlflow.search.storage import open_storage
from grpo_mlflow.search.trials import Search
from grpo_mlflow.training.evaluation import Evaluation, Outcome
from grpo_mlflow.training.progress import Progress
from grpo_mlflow.types import Completion, Prompt, Rollout, Verdict
from tests.support.small_studies import load, study_config

SPACE = "train.lr='{low: 1e-5, high: 1e-2, log: true}' train.kl_coef='{low: 0.01, high: 1}'"
LOOKS, PROBLEMS, REPLICATES = 8, 16, 8
SAVED_EVERY = 3  # evaluations, so that a killed trial comes again to what it has reported
STOPPED = {1: 4, 3: 1, 5: 2, 7: 4, 9: 7, 11: 4}  # at which evaluation, by trial, if it comes so far
PLANS = [
    *((sampler, "none") for sampler in ("tpe", "random", "gp", "cmaes", "nsga2")),
    *(("random", name) for name in ("paired", "median", "asha", "hyperband", "percentile", "patient", "threshold")),
]


def _evaluation(quality: float, share: float) -> Evaluation:
    """Every problem has draws of its own, the same for all trials; the chance of success rises with `share`."""
    outcomes = []
    for number in range(PROBLEMS):
        draws = seeding.stream(0, "problem", number).random(REPLICATES)
        prompt = Prompt(f"scripted/eval/{number}", ({"role": "user", "content": "1+1="},), (1,))
        completion = Completion((4,), "2", (-0.1,), "stop", 0)
        chance = 0.1 + (quality - 0.1) * share
        found = [Rollout(prompt, completion, Verdict(float(d < chance), {}, bool(d < chance), "2")) for d in draws]
        outcomes.append(Outcome(prompt.problem_id, tuple(found), None, 0.0))
    return Evaluation(tuple(outcomes), (1,))


class Scripted:
    """A run whose curve follows from its settings alone, and which stops where it is told to, once in each trial."""

    def __init__(self, folder: Path, stop: Callable[[], None] | None) -> None:
        self._folder, self._stop = folder, stop

    def __call__(self, resolved: Resolved, stored: object, trial: runs.Trial) -> None:
        config, name = resolved.config.train, trial.nested.name
        saved, stopped = self._folder / f"{name}.json", self._folder / f"{name}.stopped"
        reached = json.loads(saved.read_text()) if saved.exists() else 0
        luck = seeding.stream(0, f"{config.lr:.12g}", f"{config.kl_coef:.12g}")
        quality = luck.uniform(-0.3, 0.95)  # below zero, no problem is ever solved
        assert trial.on_evaluation is not None
        for look in range(reached + 1, LOOKS + 1):
            iteration = look * resolved.config.eval.interval
            progress = Progress(iteration=iteration, tokens=int(1000 * iteration * (2 - quality)))
            trial.on_evaluation(progress, _evaluation(quality, look / LOOKS))
            if look % SAVED_EVERY == 0:
                saved.write_text(json.dumps(look))
            if self._stop and look == STOPPED.get(int(name.split()[1])) and not stopped.exists():
                stopped.touch()
                self._stop()


def _go_on(resolved: Resolved, folder: Path, parent: str, stop: Callable[[], None] | None) -> None:
    """What a command does with a study, as far as trials go."""
    space = space_file.load(resolved.config.search.space, resolved)
    storage = open_storage(resolved.config.search.storage)
    study = studies.open_study(storage, resolved.config, space)
    queue = studies.Queue(study, storage, resolved.config, space)
    search = Search(resolved, space, study, queue, parent, Console(quiet=True), train=Scripted(folder, stop))
    search.run(search.revive)


def _go_on_undisturbed(resolved: Resolved, folder: Path, parent: str) -> int:
    _go_on(resolved, folder, parent, None)
    return 0


def _go_on_interrupted(resolved: Resolved, folder: Path, parent: str) -> int:
    """Begin it anew after each Ctrl-C; return how often."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    for stops in range(len(STOPPED) + 1):
        try:
            _go_on(resolved, folder, parent, interrupt)
        except KeyboardInterrupt:
            continue
        return stops
    raise AssertionError("it has not ended")


def _go_on_killed(resolved: Resolved, folder: Path, parent: str) -> int:
    """Begin it anew after each SIGKILL; return how often."""

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    for stops in range(len(STOPPED) + 1):
        process = multiprocessing.get_context("fork").Process(target=_go_on, args=(resolved, folder, parent, kill))
        process.start()
        process.join()
        if process.exitcode == 0:
            return stops
        assert process.exitcode == -signal.SIGKILL
    raise AssertionError("it has not ended")


def _outcome(resolved: Resolved) -> list[dict[str, Any]]:
    def of(trial: FrozenTrial) -> dict[str, Any]:
        noted = {key: value for key, value in trial.system_attrs.items() if not key.startswith("cma:optimizer")}
        curve = trial.intermediate_values
        return {"state": trial.state, "params": trial.params, "values": trial.values, "curve": curve, "noted": noted}

    study = load(resolved)
    trials = study.get_trials()
    # Optuna's tools print them on one line.
    assert all(len(json.dumps(noted)) <= 400 for noted in (study.user_attrs, *(trial.user_attrs for trial in trials)))
    assert sorted(trial.user_attrs[studies.SLOT] for trial in trials) == list(range(len(trials)))
    return [of(trial) for trial in trials]


@pytest.fixture(autouse=True)
def _unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written outlives a killed process without waiting for the disk, which a journal does at each line."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture(scope="module")
def parent(shared_store: str) -> str:
    client = mlflow.MlflowClient(shared_store)
    return str(client.create_run(client.create_experiment("scripted")).info.run_id)


@pytest.mark.parametrize(("sampler", "pruner"), PLANS)
def test_stopping_changes_neither_proposals_nor_decisions(
    sampler: str, pruner: str, shared_store: str, parent: str, tmp_path: Path
) -> None:
    words = [f"search.space={SPACE}", f"search.sampler={sampler}", f"search.pruner={pruner}", "search.n_trials=14"]
    words = [*words, f"train.iterations={2 * LOOKS}", "eval.interval=2", "search.cost=tokens"]
    found, stops = {}, {}
    for way in (_go_on_undisturbed, _go_on_interrupted, _go_on_killed):
        folder = tmp_path / way.__name__
        folder.mkdir()
        resolved = study_config(shared_store, folder, *words, f"search.storage=journal:{folder}/log")
        stops[way], found[way] = way(resolved, folder, parent), _outcome(resolved)
    undisturbed = found[_go_on_undisturbed]
    assert 0 < stops[_go_on_interrupted] == stops[_go_on_killed]
    assert len(undisturbed) == 14
    states = [trial["state"] for trial in undisturbed]
    assert TrialState.COMPLETE in states
    assert (TrialState.PRUNED in states) == (pruner != "none")
    assert found[_go_on_interrupted] == undisturbed
    assert found[_go_on_killed] == undisturbed
