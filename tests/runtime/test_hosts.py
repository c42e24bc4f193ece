"""Several machines: what works on one also works where only a network is shared."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from grpo_mlflow import runs
from grpo_mlflow.config import resolve
from grpo_mlflow.search import study as studies
from grpo_mlflow.search.storage import open_storage
from tests.support import held, postgres
from tests.support.fake_server import SAMPLE, FakeServer
from tests.support.hosts import Host, hosts
from tests.support.mlflow_server import Server
from tests.support.paths import ROOT
from tests.support.small_runs import SMALL, equal, newest
from tests.support.study_commands import Commands, closed_storages, require_whole
from tests.support.waiting import wait_for

pytestmark = pytest.mark.slow
TRIALS = 4
WORDS = (
    *("search.sampler=grid", "train.iterations=20", "data.task=python:tests.support.held:Held"),
    "search.space=train.lr=[" + ",".join(f"{number}e-4" for number in range(1, TRIALS + 1)) + "]",
)


@pytest.fixture
def machines() -> Iterator[list[Host]]:
    """Three machines, the test on the last."""
    with hosts(3) as found, found[-1].entered(), closed_storages():
        yield found


def _launched(words: Sequence[str], machines: Sequence[Host], port: int, folder: Path) -> list[str]:
    """Start two processes on each machine, as a launcher does; return what each machine's have said."""
    processes, logs = [], [folder / f"{host.name}.log" for host in machines]
    for number, (host, log) in enumerate(zip(machines, logs, strict=True)):
        launcher = (
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2"),
            *(f"--node_rank={number}", f"--master_addr={machines[0].address}", f"--master_port={port}"),
        )
        # gloo asks the system for the address of the machine's name, which is loopback here
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": host.interface, "OMP_NUM_THREADS": "1"}
        with log.open("w") as stream:
            processes.append(
                subprocess.Popen(
                    host.words([*launcher, "-m", "grpo_mlflow", "train", *words]),
                    stdout=stream,
                    stderr=stream,
                    env={**environment, "PYTHONPATH": str(ROOT)},
                    cwd=folder,
                )
            )
    codes = [process.wait(timeout=240) for process in processes]
    said = [log.read_text() for log in logs]
    assert codes == [0, 0], said
    return said


def test_four_processes_on_two_machines_train_like_one_with_a_server_on_a_third(
    machines: list[Host], shared_store: str, small_model: Path, tmp_path: Path
) -> None:
    *trainers, third = machines
    words = [*SMALL, "--config", "tiny", "generation.backend=vllm_server", f"tracking.uri={shared_store}"]
    words += ["generation.batch_size=2", "eval.greedy=false"]
    with FakeServer("vllm", small_model, address=third.address) as server:
        words += [f"generation.base_url={server.url}"]
        one = runs.train(resolve("tiny", [word for word in words if "=" in word])).run_id
        alone = server.requests[SAMPLE["vllm"]]
        said = _launched(words, trainers, 29500, tmp_path)
        assert server.requests[SAMPLE["vllm"]] == 2 * alone
    assert "iter    3" in said[0]
    assert "iter    3" not in said[1]
    equal(shared_store, one, newest(shared_store))


def test_a_study_over_postgresql_has_workers_on_two_machines(machines: list[Host], tmp_path: Path) -> None:
    *workers, third = machines
    tracking = Server(tmp_path, third.address)
    tracking.start()
    go_on = tmp_path / "go on"  # each waits in its first trial, or one might take all before the other has come
    commands = [Commands(tmp_path / host.name, tracking.uri, {held.VARIABLE: str(go_on)}) for host in workers]
    try:
        with postgres.server(third.address) as server:
            address = server.database()
            for own, host in zip(commands, workers, strict=True):
                (tmp_path / host.name).mkdir()
                own.start([*WORDS, f"search.storage={address}"], on=host.words)
            wait_for(lambda: any("baseline  " in own.output(0) for own in commands))
            study = optuna.load_study(study_name="grpo", storage=open_storage(address))
            wait_for(lambda: len(study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))) == len(workers))
            go_on.touch()
            outputs = [own.end(0) for own in commands]
            require_whole(tracking.uri, study, TRIALS)
            owners = {trial.user_attrs[studies.OWNER]["pid"] for trial in studies.final_trials(study)}
    finally:
        for own in commands:
            own.stop()
        tracking.stop()
    assert sorted("joining study" in output for output in outputs) == [False, True]
    assert len(owners) == 2
