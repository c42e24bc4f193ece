"""A study whose processes run on a Ray cluster."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow
import optuna
import psutil
import pytest
from optuna.trial import TrialState

from grpo_mlflow.config import Config, resolve
from grpo_mlflow.errors import UserError
from grpo_mlflow.runtime.console import Console
from grpo_mlflow.search import launchers
from grpo_mlflow.search import study as studies
from grpo_mlflow.search.ray_workers import passed, require_shared
from grpo_mlflow.search.storage import open_storage
from tests.support import held
from tests.support.paths import ROOT
from tests.support.small_studies import study_config
from tests.support.study_commands import Commands, require_whole
from tests.support.waiting import wait_for

pytest.importorskip("ray", reason="the package ray is not installed")
TRIALS = 4
WORDS = (
    *("search.launcher=ray", "search.n_jobs=3", "search.sampler=grid", "train.iterations=20"),
    "data.task=python:tests.support.held:Held",
    "search.space=train.lr=[" + ",".join(f"{number}e-4" for number in range(1, TRIALS + 1)) + "]",
)


@pytest.fixture
def cluster() -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.ray_cluster"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    yield wait_for(process.stdout.readline).strip()
    process.communicate(timeout=60)


def config(store: str, tmp_path: Path, **changed: str) -> Config:
    return study_config(store, tmp_path, *(f"search.{key}={value}" for key, value in changed.items())).config


def test_other_machines_need_a_storage_and_a_store_that_they_see(store: str, tmp_path: Path) -> None:
    hosts = {socket.gethostname(), "node-2"}
    line = "search.storage = 'sqlite:///.*/optuna.db': the Ray cluster has other machines .node-2.; allowed: postgresql"
    with pytest.raises(UserError, match=line):
        require_shared(config(store, tmp_path), hosts)
    line = "tracking.uri = 'sqlite:///.*mlflow.db': the Ray cluster has other machines .node-2.; allowed: the http://"
    with pytest.raises(UserError, match=line):
        require_shared(config(store, tmp_path, storage="journal:/shared/optuna.log"), hosts)
    require_shared(config("http://tracking:5000", tmp_path, storage="journal:/shared/optuna.log"), hosts)
    require_shared(config(store, tmp_path), {socket.gethostname()})


def test_a_cluster_that_is_not_there_is_one_line(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"  # nobody listens
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(UserError, match=f"no Ray cluster at '{address}' .*; allowed: to start one"):
            launchers.create(config(store, tmp_path, launcher="ray", n_jobs="2"), [], Console())
    assert not mlflow.MlflowClient(store).search_experiments(filter_string="name = 'grpo'")


def test_workers_get_the_variables_that_the_leader_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Referred to in the command line, in the file that it names, or in the one that this stands on; no others."""
    (tmp_path / "base.yaml").write_text("base: tiny\ndata: {settings: {api_key: '${ENV:OF_THE_BASE}'}}\n")
    (tmp_path / "mine.yaml").write_text("base: base.yaml\ntracking: {experiment: '${ENV:OF_THE_FILE}'}\n")
    variables = {"OF_THE_BASE": "a", "OF_THE_FILE": "b", "OF_THE_LINE": "c", "HF_HOME": "d"}
    for name, value in {**variables, "NOBODYS": "e", "MLFLOW_RUN_ID": "f"}.items():
        monkeypatch.setenv(name, value)
    resolve(str(tmp_path / "mine.yaml"), ["tracking.uri=postgresql://me:${ENV:OF_THE_LINE}@host/db"])
    found = passed(os.environ)
    assert found.items() >= variables.items()
    assert not found.keys() & {"NOBODYS", "MLFLOW_RUN_ID"}


@pytest.mark.slow
def test_workers_on_two_nodes_one_of_them_killed(cluster: str, store: str, tmp_path: Path) -> None:
    # The leader alone has the variable, and waits in its first trial: or it might take all before a worker has come.
    environment = {"RAY_ADDRESS": cluster, held.VARIABLE: str(tmp_path / "go on")}
    commands, address = Commands(tmp_path, store, environment), f"sqlite:///{tmp_path}/optuna.db"
    leader = commands.start([*WORDS, f"search.storage={address}"])
    try:
        wait_for(lambda: "baseline  " in commands.output(leader))
        study = optuna.load_study(study_name="grpo", storage=open_storage(address))
        own = commands.process(leader).pid

        def workers() -> set[int]:
            found = psutil.process_iter(["cmdline"])
            return {each.pid for each in found if f"search.storage={address}" in (each.info["cmdline"] or ())} - {own}

        def working() -> int | None:
            """One of Ray's workers that has a trial under way."""
            trials = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            owners = {(trial.user_attrs.get(studies.OWNER) or {}).get("pid", own) for trial in trials}
            return next(iter(owners & workers()), None)

        killed, before = wait_for(working), workers()
        assert len(before) == 2  # a node has one core
        actor = psutil.Process(killed).parent()
        assert actor is not None
        os.kill(actor.pid, signal.SIGKILL)
        wait_for(lambda: killed not in workers() and workers() - before)
        wait_for(lambda: study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
        (tmp_path / "go on").touch()
        assert "on Ray ended" not in commands.end(leader)
        require_whole(store, study, TRIALS)
        owners = [trial.user_attrs[studies.OWNER]["pid"] for trial in studies.final_trials(study)]
        assert own in owners
        assert len(set(owners)) > 1
    finally:
        commands.stop()
