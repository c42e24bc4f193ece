"""Studies of several processes, as real ones: every storage, at the same moment, and with SIGKILL in the middle."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import optuna
import psutil
import pytest
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine

from grpo_mlflow.errors import UserError
from grpo_mlflow.runtime import owners
from grpo_mlflow.search import records, recovery, rights
from grpo_mlflow.search import study as studies
from grpo_mlflow.search.paired import rates_key
from grpo_mlflow.search.storage import open_storage
from tests.support import postgres
from tests.support.study_commands import Commands, nested_runs, require_whole
from tests.support.waiting import wait_for

STORAGES = ("sqlite", "journal", "postgresql")
RANGE = "search.space=train.lr='{low: 1e-5, high: 1e-2, log: true}'"
# Imports first, so that all processes meet at the gate and then at the storage.
GATED = """
import sys, time
from pathlib import Path
import grpo_mlflow.search.optimize
from grpo_mlflow.cli.command import run
from grpo_mlflow.cli.optimize import main
gate = Path(sys.argv.pop(1))
print("at the gate", flush=True)
while not gate.exists():
    time.sleep(0.001)
run(main)
"""


@pytest.fixture(scope="module")
def _server() -> Iterator[postgres.Server]:
    with postgres.server() as found:
        yield found


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    """Close the connections of every storage that a test has opened: each keeps some for its next call."""
    engines: list[Engine] = []

    def connected(connection: Connection) -> None:
        engines.append(connection.engine)

    event.listen(Engine, "engine_connect", connected)
    yield
    event.remove(Engine, "engine_connect", connected)
    for engine in engines:
        engine.dispose()


@pytest.fixture
def address(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """The address of a storage that does not exist yet, of the kind that the test is for."""
    kind = request.param
    if kind == "postgresql":
        server: postgres.Server = request.getfixturevalue("_server")
        return server.database()
    return f"journal:{tmp_path}/optuna.journal" if kind == "journal" else f"sqlite:///{tmp_path}/optuna.db"


@pytest.fixture
def storage(tmp_path: Path) -> BaseStorage:
    return open_storage(f"sqlite:///{tmp_path}/optuna.db")


@pytest.fixture
def commands(tmp_path: Path, store: str) -> Iterator[Commands]:
    found = Commands(tmp_path, store)
    yield found
    found.stop()


def curves_by_rate(store: str) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Return the points of each trial's curves, in order of steps, by its learning rate."""
    client, found = mlflow.MlflowClient(store), {}
    for run in nested_runs(store)[1]:
        histories = {key: client.get_metric_history(run.info.run_id, key) for key in CURVES}
        points = {key: sorted((p.step, p.value) for p in history) for key, history in histories.items()}
        assert run.data.params["train.lr"] not in found, "two runs of one trial"
        found[run.data.params["train.lr"]] = points
    return found


CURVES = ("eval/pass_at_1", "train/loss_total")


# Whole studies.


@pytest.mark.slow
@pytest.mark.parametrize("address", STORAGES, indirect=True)
def test_two_commands_at_the_same_moment_on_a_new_storage(
    address: str, commands: Commands, store: str, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    words = [RANGE, "search.n_trials=6", f"search.storage={address}"]
    pair = [commands.start(words, ("-c", GATED, str(gate))) for _ in range(2)]
    wait_for(lambda: all("at the gate" in commands.output(number) for number in pair))
    gate.touch()
    outputs = [commands.end(number) for number in pair]
    assert sum("joining study" in output for output in outputs) == 1
    assert not any(postgres.PASSWORD in output for output in outputs)
    study = optuna.load_study(study_name="grpo", storage=open_storage(address))
    assert {slot: len(trials) for slot, trials in studies.slots(study).items()} == dict.fromkeys(range(6), 1)
    require_whole(store, study, 6)
    assert nested_runs(store)[0][0].data.params["search.storage"].count(postgres.PASSWORD) == 0


@pytest.mark.slow
def test_workers_killed_in_the_middle_of_trials_leave_no_trace(commands: Commands, store: str, tmp_path: Path) -> None:
    rates = ("1e-05", "2e-05", "3e-05", "5e-05", "8e-05", "0.0001", "0.0002", "0.0003", "0.0005", "0.001")
    address = f"sqlite:///{tmp_path}/optuna.db"
    words = ["search.sampler=grid", "train.iterations=60", "checkpoint.save_interval=3", f"search.storage={address}"]
    space = f"search.space=train.lr=[{','.join(rates)}]"
    gates = [tmp_path / f"gate-{number}" for number in range(3)]
    workers = [commands.start([*words, space], ("-c", GATED, str(gate))) for gate in gates]
    wait_for(lambda: all("at the gate" in commands.output(number) for number in workers))
    leader = commands.start([*words, space])
    wait_for(lambda: "baseline  " in commands.output(leader))
    study = optuna.load_study(study_name="grpo", storage=open_storage(address))
    killed: list[FrozenTrial] = []
    for worker, gate in zip(workers, gates, strict=True):
        gate.touch()
        killed.append(wait_for(partial(_in_the_middle, study, commands.process(worker))))
        commands.kill(worker)
    said = commands.end(leader)
    said += "".join(commands.output(number) for number in workers)  # a worker that waits for an equal one revives, too
    assert said.count("its process died; it is put back") == 3
    require_whole(store, study, len(rates))
    assert [len(trials) for trials in studies.slots(study).values()] == [1] * len(rates)
    numbers = [trial.number for trial in killed]  # a trial that was put back may meet the next worker that is killed
    for trial in killed:  # they have gone on as they were, in the run that they had
        final = study.trials[trial.number]
        assert final.user_attrs[studies.KILLED] == numbers.count(trial.number)
        assert final.user_attrs[studies.RUN_ID] == trial.user_attrs[studies.RUN_ID]
        assert final.intermediate_values.keys() == set(range(2, 61, 2))
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    again = sorted({str(trial.params["train.lr"]) for trial in killed})
    other = Commands(undisturbed, f"sqlite:///{undisturbed}/mlflow.db")
    address = f"sqlite:///{undisturbed}/optuna.db"
    other.end(other.start([*words[:-1], f"search.storage={address}", f"search.space=train.lr=[{','.join(again)}]"]))
    found, expected = curves_by_rate(store), curves_by_rate(f"sqlite:///{undisturbed}/mlflow.db")
    assert len(expected) == len(again)
    for rate, curves in expected.items():
        assert [step for step, _ in found[rate]["train/loss_total"]] == list(range(60))
        assert [step for step, _ in found[rate]["eval/pass_at_1"]] == list(range(0, 61, 2))
        assert found[rate] == curves


def _in_the_middle(study: optuna.Study, worker: subprocess.Popen[str]) -> FrozenTrial | None:
    """Return the trial of a process once it has passed some evaluations here, and has some before it."""
    assert worker.poll() is None, "it ended before it had a trial: the queue was too short"
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        own = (trial.user_attrs.get(studies.OWNER) or {}).get("pid") == worker.pid
        if own and trial.datetime_start and time.time() - trial.datetime_start.timestamp() > 1.0:
            steps = studies.curve(trial)
            if steps and 6 <= max(steps) < 50:
                return trial
    return None


@pytest.mark.slow
def test_a_killed_leader_and_its_killed_worker(commands: Commands, store: str, tmp_path: Path) -> None:
    address = f"sqlite:///{tmp_path}/optuna.db"
    rates = ",".join(f"{number}e-4" for number in range(1, 9))
    words = [f"search.space=train.lr=[{rates}]", "search.sampler=grid", "train.iterations=60"]
    words = [*words, f"search.storage={address}"]
    first = commands.start([*words, "search.n_jobs=2"])
    pid = commands.process(first).pid
    wait_for(lambda: "baseline  " in commands.output(first))
    study = optuna.load_study(study_name="grpo", storage=open_storage(address))

    def worker_with_trial(besides: int = 0) -> int | None:
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            owner = (trial.user_attrs.get(studies.OWNER) or {}).get("pid", pid)
            if owner not in (pid, besides) and studies.curve(trial):
                return int(owner)
        return None

    worker = wait_for(worker_with_trial)
    os.kill(worker, signal.SIGKILL)
    children = psutil.Process(pid).children
    wait_for(
        lambda: any(child.pid != worker and {"grpo_mlflow", "optimize"} <= {*child.cmdline()} for child in children())
    )
    replacement = next(child for child in children() if child.pid != worker)
    commands.kill(first)
    replacement.kill()  # it would go on by itself, and leave nothing to do
    begun = time.monotonic()
    second = commands.start(words)
    wait_for(lambda: "study grpo: grid proposes" in commands.output(second))
    assert time.monotonic() - begun < owners._DEAD / 4
    output = commands.end(second)
    assert "joining study" not in output
    require_whole(store, study, 8)
    assert nested_runs(store)[0][0].info.run_id == study.user_attrs["parent_run_id"]
    for curves in curves_by_rate(store).values():
        assert [step for step, _ in curves["train/loss_total"]] == list(range(60))
        assert [step for step, _ in curves["eval/pass_at_1"]] == list(range(0, 61, 2))


# Parts of it.


def _take_all(address: str, gate: Any, taken: Any) -> None:
    study = optuna.load_study(study_name="queue", storage=open_storage(address))
    gate.wait()
    slots = []
    while study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        trial = study.ask()
        if studies.SLOT in trial.user_attrs:
            slots.append(trial.user_attrs[studies.SLOT])
    taken.put(slots)


@pytest.mark.parametrize("address", STORAGES, indirect=True)
def test_no_place_in_the_queue_is_taken_twice(address: str) -> None:
    study = optuna.create_study(study_name="queue", storage=open_storage(address))
    for slot in range(40):
        study.enqueue_trial({}, user_attrs={studies.SLOT: slot})
    context = multiprocessing.get_context("fork")
    gate, taken = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_take_all, args=(address, gate, taken)) for _ in range(3)]
    for process in processes:
        process.start()
    slots = [slot for _ in processes for slot in taken.get(timeout=60)]
    for process in processes:
        process.join()
    assert sorted(slots) == list(range(40))


def test_a_process_is_gone_when_it_has_ended_or_its_number_is_anothers() -> None:
    me = owners.me()
    assert not owners.gone(me)
    assert owners.gone({**me, "started": me["started"] - 100})
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        found = {**me, "pid": child.pid, "started": psutil.Process(child.pid).create_time()}
        assert not owners.gone(found)
        child.kill()
        wait_for(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE)
        assert owners.gone(found)  # nobody has fetched its exit status yet
    assert owners.gone(found)


def test_a_process_of_another_machine_is_gone_when_it_was_not_seen_for_long() -> None:
    elsewhere = {**owners.me(), "machine": "elsewhere", "pid": 1, "started": 0.0}
    assert not owners.gone({**elsewhere, "seen": time.time() - owners._DEAD + 5})
    assert owners.gone({**elsewhere, "seen": time.time() - owners._DEAD - 5})
    assert owners.me()["machine"].startswith(socket.gethostname())


def _dead() -> dict[str, Any]:
    return {**owners.me(), "started": 1.0}


def test_one_process_leads_and_its_right_ends_with_it(storage: BaseStorage) -> None:
    right = rights.take(storage, "study")
    assert right is not None
    with right.held():
        assert rights.take(storage, "study") is None
        right.announce("a run")
        assert rights.parent_of(storage, "study") == "a run"
        right.require()
        assert rights.take(storage, "another") is not None
    assert rights.parent_of(storage, "study") is None
    assert not any("study" in study.study_name for study in storage.get_all_studies())


def _lead_once(address: str, gate: Any, led: Any) -> None:
    storage = open_storage(address)
    gate.wait()
    right = rights.take(storage, "study")
    if right is None:
        led.put(0)
        gate.wait()
        return
    with right.held():
        led.put(1)
        gate.wait()  # the others have found a living leader
        right.require()


@pytest.mark.parametrize("address", STORAGES, indirect=True)
def test_of_several_that_meet_a_dead_leader_one_takes_over(address: str) -> None:
    context = multiprocessing.get_context("fork")
    storage = open_storage(address)
    right = rights.take(storage, "study")
    assert right is not None
    right._note("owner", _dead())
    gate, led = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_lead_once, args=(address, gate, led)) for _ in range(3)]
    for process in processes:
        process.start()
    assert sum(led.get(timeout=60) for _ in processes) == 1
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]


@pytest.fixture
def queue(storage: BaseStorage) -> optuna.Study:
    study = optuna.create_study(study_name="queue", storage=storage)
    study.enqueue_trial({"x": 0.5}, user_attrs={studies.SLOT: 0})
    return study


def _begin(study: optuna.Study, owner: dict[str, Any]) -> optuna.Trial:
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    trial.set_user_attr(studies.OWNER, owner)
    trial.set_user_attr(studies.SETTLED, True)
    trial.set_user_attr(studies.RUN_ID, "its run")
    records.keep_of(trial, rates_key(2), [0.25, 0.75])
    records.report(trial, 2, 0.5)
    return trial


def test_a_trial_whose_process_died_is_put_back_with_what_it_has(queue: optuna.Study) -> None:
    begun = _begin(queue, _dead())
    begun.storage.set_trial_system_attr(begun._trial_id, "completed_rung_0", 0.5)
    assert len(recovery.revive(queue, {})) == 1
    assert recovery.revive(queue, {}) == []
    assert [trial.state for trial in studies.slots(queue)[0]] == [TrialState.WAITING]
    again = queue.ask()
    assert again.number == begun.number
    assert records.now(again).system_attrs["completed_rung_0"] == 0.5
    assert records.now(again).intermediate_values == {2: 0.5}
    assert again.suggest_float("x", 0, 1) == 0.5
    assert again.user_attrs[studies.RUN_ID] == "its run"
    assert studies.curve(again) == {2: [0.25, 0.75]}
    assert again.user_attrs[studies.KILLED] == 1
    assert again.user_attrs[studies.OWNER] is None


def test_a_trial_of_a_living_process_is_left_alone(queue: optuna.Study) -> None:
    _begin(queue, owners.me())
    assert recovery.revive(queue, {}) == []
    assert queue.trials[0].state == TrialState.RUNNING


def test_a_trial_without_an_owner_is_put_back_only_after_a_while(queue: optuna.Study) -> None:
    queue.ask()
    unsigned: recovery.Unsigned = {}

    def wait() -> None:
        for start in unsigned:
            unsigned[start] -= 2 * recovery._UNSIGNED

    assert recovery.revive(queue, unsigned) == []
    wait()
    assert len(recovery.revive(queue, unsigned)) == 1
    assert queue.trials[-1].state == TrialState.WAITING
    queue.ask()
    wait()
    assert recovery.revive(queue, unsigned) == []  # who has taken it now may sign it yet


def test_a_process_that_was_taken_for_dead_leaves_its_trial_alone(queue: optuna.Study) -> None:
    trial = _begin(queue, owners.me())
    recovery.require_own(trial)
    trial.set_user_attr(studies.OWNER, {**owners.me(), "pid": 1})
    with pytest.raises(UserError, match="trial 0: another process has it"):
        recovery.require_own(trial)
    recovery.put_back(queue, trial)
    assert queue.trials[0].state == TrialState.RUNNING


def _adopt(address: str, gate: Any, adopted: Any) -> None:
    study = optuna.load_study(study_name="queue", storage=open_storage(address))
    gate.wait()
    until, taken = time.monotonic() + 3.0, 0
    while time.monotonic() < until:
        recovery.revive(study, {})
        if study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            trial = study.ask()
            if studies.SLOT in trial.user_attrs:
                trial.set_user_attr(studies.OWNER, owners.me())
                taken += 1
    adopted.put(taken)
    gate.wait()  # the others see a living owner until then


@pytest.mark.parametrize("address", STORAGES, indirect=True)
def test_of_several_that_find_a_dead_trial_one_goes_on_with_it(address: str) -> None:
    study = optuna.create_study(study_name="queue", storage=open_storage(address))
    study.enqueue_trial({}, user_attrs={studies.SLOT: 0})
    _begin(study, _dead())
    context = multiprocessing.get_context("fork")
    gate, adopted = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_adopt, args=(address, gate, adopted)) for _ in range(3)]
    for process in processes:
        process.start()
    assert sum(adopted.get(timeout=60) for _ in processes) == 1
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    (trial,) = studies.slots(study)[0]
    assert (trial.number, trial.state, trial.user_attrs[studies.KILLED]) == (0, TrialState.RUNNING, 1)
    assert records.kept_at(trial, rates_key(2)) == [0.25, 0.75]


def test_a_trial_that_kills_its_process_again_and_again_is_given_up(queue: optuna.Study) -> None:
    lines = []
    for _ in range(recovery._MAX_KILLED):
        _begin(queue, _dead())
        lines += recovery.revive(queue, {})
    assert ["given up" in line for line in lines] == [False] * 4 + [True]
    assert [trial.state for trial in studies.slots(queue)[0]] == [TrialState.FAIL]
    assert not queue.get_trials(states=(TrialState.WAITING,))
