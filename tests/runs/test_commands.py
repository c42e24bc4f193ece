"""What somebody asks of a run by its tag in MLflow is done within an iteration, answered, and not done twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import mlflow
import pytest
from optuna.trial import TrialState

from grpo_mlflow import runs
from grpo_mlflow.runtime.interrupts import Interrupted
from grpo_mlflow.tracking.places import ANSWER, COMMAND
from tests.support.asking import Asking
from tests.support.mlflow_server import Server
from tests.support.small_runs import curves, newest, resume, small
from tests.support.small_studies import load, search, study_config
from tests.support.waiting import wait_for

TASK = ("data.task=python:tests.support.asking:Asking", "checkpoint.save_interval=0", "eval.enabled=false")


@pytest.fixture(params=["a database", pytest.param("a server", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest, store: str, tmp_path: Path) -> Iterator[tuple[str, float]]:
    """A store, and the seconds in which a run has surely looked at it."""
    if request.param == "a database":
        yield store, 1.0
        return
    server = Server(tmp_path)
    server.start()
    yield server.uri, 4.0
    server.stop()


def asking(store: str, asked: Mapping[int, str], seconds: float, others: float = 0.0) -> Callable[[int], None]:
    """Return what sets the tag while the iterations of these versions go on, each for so long; the others take less.

    It waits for the answer to the command before: an answer takes the tag away, and MLflow has no compare-and-set.
    """
    client, left = mlflow.MlflowClient(store), dict(asked)

    def then(version: int) -> None:
        if (command := left.pop(version, None)) is not None:
            wait_for(lambda: not tags(store).get(COMMAND))
            client.set_tag(newest(store), COMMAND, command)
        time.sleep(seconds if command is not None else others)

    return then


def tags(store: str) -> dict[str, str]:
    found: dict[str, str] = mlflow.MlflowClient(store).get_run(newest(store)).data.tags
    return found


def saved(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_a_run_saves_and_stops_when_asked_and_goes_on_without_being_asked_again(
    place: tuple[str, float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    store, seconds = place
    monkeypatch.setattr(Asking, "then", staticmethod(asking(store, {1: "save", 3: "dance", 5: "Stop"}, seconds)))
    words = [*TASK, "train.iterations=8", "checkpoint.keep_last=9"]
    with pytest.raises(Interrupted):
        runs.train(small(store, *words))
    told, found = capsys.readouterr().out, tags(store)
    assert "asked by MLflow: save: saved iter_002" in told
    assert "asked by MLflow: dance: not done; allowed: save, stop" in told
    assert found[ANSWER] == "Stop: ended at iteration 6"
    assert (found[COMMAND], found["grpo.ended"]) == ("", "KILLED")
    assert f"resume={newest(store)}" in told
    finished = resume(store, newest(store))
    assert "asked by MLflow" not in capsys.readouterr().out
    assert tags(store)[ANSWER] == "Stop: ended at iteration 6"
    assert saved(finished.run_dir) == ["iter_002", "iter_006", "iter_008"]
    steps = [step for step, _ in curves(store, finished.run_id)["train/reward_mean"]]
    assert steps == list(range(8))


def test_the_same_command_can_be_given_again(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Asking, "then", staticmethod(asking(store, {1: "save", 3: "save"}, 1.0, others=1.0)))
    finished = runs.train(small(store, *TASK, "train.iterations=5", "checkpoint.keep_last=9"))
    assert saved(finished.run_dir) == ["iter_002", "iter_004", "iter_005"]


def test_a_command_is_not_done_again_while_its_answer_is_on_its_way(
    store: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The store is away when the run ends, so the command still stands there when the run goes on."""
    database, aside = tmp_path / "mlflow.db", tmp_path / "aside.db"
    ask = asking(store, {1: "stop"}, 1.0)

    def then(version: int) -> None:
        ask(version)
        if version == 1:
            database.rename(aside)
            database.mkdir()

    monkeypatch.setattr(Asking, "then", staticmethod(then))
    with pytest.raises(Interrupted):
        runs.train(small(store, *TASK, "train.iterations=4"))
    database.rmdir()
    aside.rename(database)
    assert tags(store)[COMMAND] == "stop"
    monkeypatch.setattr(Asking, "then", staticmethod(asking(store, {}, 0.0, others=0.3)))
    assert resume(store, newest(store)).progress.iteration == 4
    assert (tags(store)[COMMAND], tags(store)[ANSWER]) == ("", "stop: ended at iteration 2")


def test_a_trial_is_pruned_when_asked_and_a_study_stops(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved = study_config(store, tmp_path, TASK[0], "search.n_trials=2", "search.space=train.lr=[1e-4,2e-4]")
    client, asked = mlflow.MlflowClient(store), list[str]()

    def then(version: int) -> None:
        run_id = newest(store)
        run = client.get_run(run_id)
        if version != 2 or "optuna.trial" not in run.data.tags or len(asked) == 2:
            return
        target, command = (run.data.tags["mlflow.parentRunId"], "stop") if asked else (run_id, "prune")
        client.set_tag(target, COMMAND, command)
        asked.append(target)
        time.sleep(0.5)

    monkeypatch.setattr(Asking, "then", staticmethod(then))
    with pytest.raises(Interrupted):
        search(resolved)
    states = [trial.state for trial in load(resolved).get_trials()]
    assert states[0] == TrialState.PRUNED
    assert TrialState.COMPLETE not in states
    assert client.get_run(asked[0]).data.tags[ANSWER] == "prune: ended at iteration 3"
    assert client.get_run(asked[1]).data.tags[ANSWER] == "stop: stopped"
    assert len(search(resolved)) == 1  # the same command goes on, with the trial that was under way


def test_what_was_asked_while_nothing_ran_is_not_done(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Asking, "then", staticmethod(asking(store, {}, 0.0, others=0.3)))
    finished = runs.train(small(store, *TASK, "train.iterations=1"))
    mlflow.MlflowClient(store).set_tag(finished.run_id, COMMAND, "stop")
    assert resume(store, finished.run_id, "train.iterations=3").progress.iteration == 3
    assert (tags(store)[COMMAND], tags(store)[ANSWER]) == ("", "stop: not done: it was asked while nothing ran")
