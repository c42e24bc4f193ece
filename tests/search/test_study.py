"""Whole studies of small trials: what they leave, and that failing, stopping and joining change nothing."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import mlflow
import optuna
import pytest
from mlflow.entities import Run
from optuna.trial import FrozenTrial, TrialState

from grpo_mlflow import runs
from grpo_mlflow.config import TRAITS, Arguments, Resolved, resolve
from grpo_mlflow.errors import ServerFailed, StoreAway, UserError
from grpo_mlflow.runs.stored import find, resolve_evaluation
from grpo_mlflow.runtime import interrupts
from grpo_mlflow.runtime.console import Console
from grpo_mlflow.search import space_file
from grpo_mlflow.search import study as studies
from grpo_mlflow.search.storage import open_storage
from grpo_mlflow.search.study import final_trials, objective_value, slots
from grpo_mlflow.search.trials import Search, Train
from tests.support.fake_server import Answer, FakeServer, Fault
from tests.support.paths import ROOT
from tests.support.small_runs import SMALL
from tests.support.small_studies import STUDY, load, search, study_config


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def all_runs(store: str, kind: str) -> list[Run]:
    client = mlflow.MlflowClient(store)
    experiment = client.get_experiment_by_name("grpo").experiment_id
    found: list[Run] = client.search_runs([experiment], f"tags.`grpo.kind` = '{kind}'", order_by=["start_time"])
    return found


def test_a_study_waits_for_a_server_that_fails_and_goes_on_at_another(
    store: str, tmp_path: Path, small_model: Path
) -> None:
    def leave(server: FakeServer, answer: Answer) -> Answer:
        server.away(10**6)
        return answer

    def served(server: FakeServer) -> Resolved:
        words = ["generation.backend=vllm_server", f"generation.base_url={server.url}", "generation.retry_seconds=1"]
        return study_config(store, tmp_path, *words, "search.sampler=grid", "search.space=train.lr=[1e-3,2e-3]")

    with FakeServer("vllm", small_model) as server:
        server.faults.append(Fault("/v1/completions", leave, loads=7))
        with pytest.raises(ServerFailed, match=server.url):
            search(served(server))
    with FakeServer("vllm", small_model) as server:
        resolved = served(server)
        assert search(resolved)
    study = load(resolved)
    assert [trial.state for trial in final_trials(study)] == [TrialState.COMPLETE] * 2
    assert {run.info.status for run in all_runs(store, "train")} == {"FINISHED"}
    assert len(all_runs(store, "train")) == 2  # the interrupted trial went on in its own run


def test_a_grid_leaves_a_run_per_combination_under_one_parent(store: str, tmp_path: Path) -> None:
    grid = "train.lr=[1e-3,2e-3] train.kl_coef=[0.01,0.02]"
    resolved = study_config(store, tmp_path, "search.sampler=grid", f"search.space={grid}")
    finalists = search(resolved)
    (parent,) = all_runs(store, "optimize")
    children = all_runs(store, "train")
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert {run.info.status for run in [parent, *children]} == {"FINISHED"}
    found = {(run.data.params["train.lr"], run.data.params["train.kl_coef"]) for run in children}
    assert found == {(lr, kl) for lr in ("0.001", "0.002") for kl in ("0.01", "0.02")}
    assert all("train/loss_total" in run.data.metrics for run in children)
    folder = Path(parent.info.artifact_uri) / "study"
    rows = list(csv.DictReader(io.StringIO((folder / "trials.csv").read_text())))
    assert [row["state"] for row in rows] == ["COMPLETE"] * 4
    assert {row["run_id"] for row in rows} == {run.info.run_id for run in children}
    assert "data:image/png;base64," in (folder / "report.html").read_text()
    confirmed = [finalist.confirmed.value for finalist in finalists]
    measured = {run.info.run_name: run.data.metrics for run in all_runs(store, "evaluate")}
    ranked = [measured[f"confirm-{finalist.trial.number}"]["eval/pass_at_1"] for finalist in finalists]
    assert ranked == sorted(ranked, reverse=True)
    assert confirmed == [measured[f"final-{finalist.trial.number}"]["eval/pass_at_1"] for finalist in finalists]
    assert parent.data.metrics["study/confirmed_pass_at_1"] == confirmed[0]
    best = resolve(str(folder / "best_config.yaml")).config
    assert (best.train.lr, best.train.kl_coef) == (
        finalists[0].trial.params["train.lr"],
        finalists[0].trial.params["train.kl_coef"],
    )
    assert best.eval == resolved.config.eval
    # 8 seeds name fewer different problems, and those that the search or the ranking asked are left out
    assert len(finalists[0].rates) == measured[f"final-{finalists[0].trial.number}"]["eval/tasks"] < 8


def test_the_same_command_continues_and_equal_settings_are_not_paid_for_twice(store: str, tmp_path: Path) -> None:
    choice = "search.space=train.lr=[1e-3]"
    search(study_config(store, tmp_path, choice, "search.n_trials=1"))
    resolved = study_config(store, tmp_path, choice, "search.n_trials=3")
    search(resolved)
    trials = final_trials(load(resolved))
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 3
    assert len({trial.value for trial in trials}) == 1
    assert [trial.user_attrs.get("duplicate_of") for trial in trials[1:]] == [0, 0]
    assert len(all_runs(store, "train")) == 1
    assert len(all_runs(store, "optimize")) == 1


def test_a_failing_trial_ends_neither_the_study_nor_counts_as_a_score(store: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    names = f"search.space=model.train_id=[tiny,{broken}]"
    resolved = study_config(store, tmp_path, "search.sampler=grid", names)
    finalists = search(resolved)
    states = {trial.params["model.train_id"]: trial.state for trial in final_trials(load(resolved))}
    assert states == {"tiny": TrialState.COMPLETE, str(broken): TrialState.FAIL}
    assert [finalist.trial.params["model.train_id"] for finalist in finalists] == ["tiny"]
    assert sorted(run.info.status for run in all_runs(store, "train")) == ["FAILED", "FINISHED"]
    assert all_runs(store, "optimize")[0].info.status == "FINISHED"


def test_pruned_trials_show_as_pruned(store: str, tmp_path: Path) -> None:
    """Threshold ends every trial whose pass@1 is below .02, which a learning rate of .1 sees to."""
    words = ["search.space=train.lr=[1e-3,0.1]", "search.sampler=grid", "search.pruner=threshold"]
    resolved = study_config(store, tmp_path, *words, "train.iterations=12", "eval.num_ids=32")
    search(resolved)
    states = {trial.params["train.lr"]: trial.state for trial in final_trials(load(resolved))}
    assert states == {1e-3: TrialState.COMPLETE, 0.1: TrialState.PRUNED}
    runs = {run.data.params["train.lr"]: run for run in all_runs(store, "train")}
    assert (runs["0.1"].info.status, runs["0.1"].data.tags["optuna.state"]) == ("KILLED", "PRUNED")
    assert (runs["0.001"].info.status, runs["0.001"].data.tags["optuna.trial"]) == ("FINISHED", "0")


def test_the_untrained_model_is_evaluated_once_where_it_can_be(store: str, tmp_path: Path) -> None:
    """A mark in the shared evaluation shows which trials use it."""
    words = ["search.space=train.lr=[1e-3,2e-3] generation.temperature=[0.5,1.0]", "search.sampler=random"]
    search(study_config(store, tmp_path, *words, "search.n_trials=1"))
    (parent,) = all_runs(store, "optimize")
    path = Path(parent.info.artifact_uri) / "study" / "baseline.jsonl"
    path.write_text(re.sub(r'"reward": [0-9.]+', '"reward": 77.0', path.read_text()))
    search(study_config(store, tmp_path, *words, "search.n_trials=9"))
    assert [run.info.run_name for run in all_runs(store, "evaluate")].count("baseline") == 1
    client = mlflow.MlflowClient(store)
    later = all_runs(store, "train")[1:]
    assert {run.data.params["generation.temperature"] for run in later} == {"0.5", "1.0"}
    for run in later:
        first = client.get_metric_history(run.info.run_id, "eval/mean_at_1")[0]
        assert (first.step, first.value == 77.0) == (0, run.data.params["generation.temperature"] == "1.0")


def test_the_configs_own_settings_come_first_and_are_measured_beside_the_winner(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["search.space=train.lr='{low: 1e-5, high: 1e-2, log: true}'", "search.n_trials=3", "search.finalists=1"]
    resolved = study_config(store, tmp_path, *words, "train.lr=1e-5", "train.lr_warmup_steps=0", "train.iterations=10")
    (winner,) = search(resolved)
    first = final_trials(load(resolved))[0]
    assert first.params == {"train.lr": 1e-5}
    (parent,) = all_runs(store, "optimize")
    measured = {run.info.run_name: run.data.metrics["eval/pass_at_1"] for run in all_runs(store, "evaluate")}
    assert measured[f"confirm-{winner.trial.number}"] == parent.data.metrics["study/confirmed_pass_at_1"]
    assert measured["confirm-0"] == parent.data.metrics["study/own_pass_at_1"]
    said = capsys.readouterr().out
    assert winner.trial.number == 0 or "against your own settings" in said


def test_the_winner_is_registered_and_can_be_evaluated_by_its_alias(store: str, tmp_path: Path) -> None:
    (winner, *_) = search(study_config(store, tmp_path, "search.space=train.lr=[1e-3]", "search.n_trials=1"))
    uri = f"tracking.uri={store}"
    resolved, folder = resolve_evaluation(Arguments("", (uri,), False, {}), "models:/grpo@champion", "best")
    stored = find(winner.trial.user_attrs["run_id"], store)
    assert stored.checkpoint is not None
    assert folder == stored.checkpoint.path
    assert resolved.config.train.lr == 1e-3
    with pytest.raises(UserError, match="models:/NAME@ALIAS"):
        find("models:/nobody@champion", store)


def test_finalists_are_trained_again_with_new_seeds(store: str, tmp_path: Path) -> None:
    words = ["search.space=train.lr=[1e-3,2e-3]", "search.sampler=grid", "search.finalists=1", "search.retrain_seeds=2"]
    resolved = study_config(store, tmp_path, *words)
    (winner,) = search(resolved)
    again = [run for run in all_runs(store, "train") if run.info.run_name.startswith("retrain-")]
    assert len({run.data.params["seed"] for run in again} - {"0"}) == 2
    confirmed = [run for run in all_runs(store, "evaluate") if run.info.run_name.startswith("confirm-")]
    scores = sorted(run.data.metrics["eval/pass_at_1"] for run in confirmed)
    assert sorted(winner.retrained) == pytest.approx(scores)
    assert winner.confirmed.value == pytest.approx(sum(scores) / 2)
    assert {run.data.params["seed"] for run in confirmed} == {"0"}  # the same draws for all
    search(resolved)  # what was measured is not measured again
    assert len(all_runs(store, "train")) == 4


def test_two_objectives(store: str, tmp_path: Path) -> None:
    words = ["search.space=train.iterations=[2,4,6]", "search.sampler=nsga2", "search.n_trials=4", "search.cost=tokens"]
    resolved = study_config(store, tmp_path, *words, "train.lr_warmup_steps=0")
    search(resolved)
    trials = final_trials(load(resolved))
    assert len(trials[0].values) == 2
    tokens = {trial.params["train.iterations"]: trial.values[1] for trial in trials}
    assert sorted(tokens, key=lambda iterations: tokens[iterations]) == sorted(tokens)
    run = find(trials[0].user_attrs["run_id"], store)
    assert run.checkpoint is not None
    state = json.loads((run.checkpoint.path / "trainer" / "state.json").read_text())
    assert state["progress"]["tokens"] == trials[0].values[1]


@pytest.mark.parametrize(
    ("objective", "window", "expected"),
    [("last", 3, 0.5), ("best", 3, 0.875), ("mean", 2, 0.6875), ("mean", 3, 0.5), ("mean", 9, 0.5)],
)
def test_a_trials_score(objective: str, window: int, expected: float) -> None:
    rates = [[0.0, 0.25], [0.75, 1.0], [0.0, 1.0]]  # .125, .875, .5
    assert objective_value(rates, objective, window) == expected


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ("train.iterations=6", "train.iterations = 6: study 'grpo' was begun with 4"),
        ("search.objective=best", 'search.objective = "best": study \'grpo\' was begun with "last"'),
        ("search.space=train.lr=[1e-3,3e-3]", "search.space: train.lr"),
        ("search.sampler=nsga2", "begun with 1 objective"),
        ("search.sampler=grid", "begun with another grid or sampler"),
    ],
)
def test_a_study_is_not_continued_with_what_cannot_be_compared(
    store: str, tmp_path: Path, changed: str, named: str
) -> None:
    words = ["search.space=train.lr=[1e-3]", "search.n_trials=1"]
    search(study_config(store, tmp_path, *words, "search.finalists=0"))
    with pytest.raises(UserError, match=re.escape(named)):
        search(study_config(store, tmp_path, *words, changed))
    assert len(all_runs(store, "train")) == 1


def test_a_study_notes_what_its_trials_must_have_in_common(store: str, tmp_path: Path) -> None:
    begun = study_config(store, tmp_path, "search.space=train.lr=[1e-3]")
    space, storage = space_file.load("train.lr=[1e-3]", begun), open_storage(begun.config.search.storage)
    study = studies.open_study(storage, begun.config, space)
    assert set(study.user_attrs["config"]) == {key for key, traits in TRAITS.items() if traits.compared}
    free = ("search.n_trials=9", "tracking.run_name=x", "checkpoint.keep_last=7", "generation.timeout=5")
    studies.open_study(storage, study_config(store, tmp_path, *free, "train.lr=0.5").config, space)
    for changed in ("model.dtype=bfloat16", "eval.interval=3", "search.cost=seconds", "seed=5"):
        with pytest.raises(UserError, match=f"^{changed.partition('=')[0]} = .* was begun with"):
            studies.open_study(storage, study_config(store, tmp_path, changed).config, space)


def test_a_study_without_a_single_result_fails_and_says_why(store: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    names = f"search.space=model.train_id=[{tmp_path}/a,{tmp_path}/b]"
    with pytest.raises(UserError, match=r"no trial finished; the first failed with: .*/a"):
        search(study_config(store, tmp_path, "search.sampler=grid", names))
    (parent,) = all_runs(store, "optimize")
    assert parent.info.status == "FAILED"
    table = (Path(parent.info.artifact_uri) / "study" / "trials.csv").read_text()
    assert [row["state"] for row in csv.DictReader(io.StringIO(table))] == ["FAIL", "FAIL"]


def test_a_study_stays_with_its_mlflow_store(store: str, tmp_path: Path) -> None:
    words = ["search.space=train.lr=[1e-3]", "search.n_trials=1", "search.finalists=0"]
    search(study_config(store, tmp_path, *words))
    with pytest.raises(UserError, match="is not in this MLflow store"):
        search(study_config(f"sqlite:///{tmp_path}/other.db", tmp_path, *words))
    (tmp_path / "beside").mkdir()
    open_storage(None, f"sqlite:///{tmp_path}/beside/mlflow.db")
    assert (tmp_path / "beside" / "optuna.db").is_file()


def test_no_trial_starts_after_the_time_is_up(store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["search.space=train.lr='{low: 1e-4, high: 1e-2}'", "search.n_trials=50", "search.timeout=0.5"]
    resolved = study_config(store, tmp_path, *words)
    search(resolved)
    states = [trial.state for trial in final_trials(load(resolved))]
    finished = states.count(TrialState.COMPLETE)
    assert 1 <= finished < 10
    assert set(states) == {TrialState.COMPLETE, TrialState.WAITING}
    assert f"{50 - finished} not begun" in capsys.readouterr().out


def _command(store: str, tmp_path: Path, *overrides: str) -> subprocess.Popen[str]:
    storage = f"search.storage=sqlite:///{tmp_path}/optuna.db"
    words = [*SMALL, *STUDY, f"tracking.uri={store}", storage, *overrides]
    return subprocess.Popen(
        [sys.executable, "-m", "entrypoints.optimize", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_ctrl_c_stops_cleanly_and_the_trial_goes_on_in_its_run(store: str, tmp_path: Path) -> None:
    words = ["search.space=train.lr=[1e-3,2e-3]", "search.sampler=grid", "train.iterations=30"]
    process = _command(store, tmp_path, *words)
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if "trial 1  iteration    4" in line:
            process.send_signal(signal.SIGINT)
            break
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130, seen + rest
    assert "Traceback" not in seen + rest
    assert [run.info.status for run in all_runs(store, "train")] == ["FINISHED", "KILLED"]
    assert all_runs(store, "optimize")[0].info.status == "KILLED"
    again = _command(store, tmp_path, *words)
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output
    assert [run.info.status for run in all_runs(store, "train")] == ["FINISHED", "FINISHED"]
    client = mlflow.MlflowClient(store)
    curve = client.get_metric_history(all_runs(store, "train")[1].info.run_id, "eval/pass_at_1")
    assert [point.step for point in curve] == list(range(0, 31, 2))
    resolved = study_config(store, tmp_path, *words)
    assert [len(trials) for trials in slots(load(resolved)).values()] == [1, 2]


@pytest.mark.parametrize("after", [None, 0.5], ids=["its process died", "its process is about to sign"])
def test_a_study_that_was_created_but_not_signed_is_continued(store: str, tmp_path: Path, after: float | None) -> None:
    words = ("search.space=train.lr=[1e-3,2e-3]", "search.sampler=grid")
    resolved = study_config(store, tmp_path, *words)
    space = space_file.load(resolved.config.search.space, resolved)
    storage = open_storage(resolved.config.search.storage)
    made = optuna.create_study(study_name="grpo", storage=storage, direction="maximize")
    if after is None:
        assert studies.open_study(storage, resolved.config, space).user_attrs.keys() == {"config", "grid"}
    else:
        other = study_config(store, tmp_path, "search.space=train.lr=[1e-3,3e-3]", words[1])
        signature = other.config, space_file.load(other.config.search.space, other)
        timer = threading.Timer(after, lambda: studies._sign(made, *signature))
        timer.start()
        with pytest.raises(UserError, match="was begun with another grid"):
            studies.open_study(storage, resolved.config, space)
        timer.join()


def test_a_storage_that_is_away_is_told_in_one_line(tmp_path: Path) -> None:
    storage = open_storage(f"sqlite:///{tmp_path}/optuna.db")
    trial = optuna.create_study(storage=storage).ask()
    (tmp_path / "optuna.db").write_bytes(b"not a database" * 1000)
    with pytest.raises(StoreAway, match=r"^search.storage = .*optuna.db': \S.*$"):
        trial.report(0.5, 0)


def scripted_search(resolved: Resolved, train: Train) -> tuple[Search, optuna.Study]:
    space = space_file.load(resolved.config.search.space, resolved)
    storage = open_storage(resolved.config.search.storage)
    study = studies.open_study(storage, resolved.config, space)
    queue = studies.Queue(study, storage, resolved.config, space)
    return Search(resolved, space, study, queue, "0" * 32, Console(quiet=True), train=train), study


def test_a_trial_is_not_failed_by_a_storage_that_is_away(store: str, tmp_path: Path) -> None:
    folder, away = tmp_path / "shared", tmp_path / "away"
    resolved = study_config(store, tmp_path, "search.space=train.lr=[1e-3]", f"search.storage=journal:{folder}/log")

    def train(resolved: Resolved, stored: object, trial: runs.Trial) -> None:
        folder.rename(away)
        trial.on_start("1" * 32)

    scripted, study = scripted_search(resolved, train)
    with pytest.raises(StoreAway, match=r"search\.storage = .*No such file"):
        scripted.run()
    away.rename(folder)
    assert TrialState.FAIL not in [trial.state for trial in study.get_trials()]


def test_a_signal_that_comes_with_an_error_ends_the_study(store: str, tmp_path: Path) -> None:
    began = []

    def train(resolved: Resolved, stored: object, trial: runs.Trial) -> None:
        began.append(trial)
        with interrupts.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            raise UserError("the gradient is not finite")

    scripted, study = scripted_search(study_config(store, tmp_path, "search.space=train.lr=[1e-3,2e-3]"), train)
    with pytest.raises(interrupts.Interrupted), interrupts.handled():
        scripted.run()
    assert len(began) == 1
    assert final_trials(study)[0].user_attrs["error"] == "the gradient is not finite"


class Interrupted(optuna.samplers.RandomSampler):
    """A signal comes while the study is asked for a trial."""

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_trial_that_is_begun_as_a_signal_comes_is_put_back(store: str, tmp_path: Path) -> None:
    resolved = study_config(store, tmp_path, "search.space=train.lr=[1e-3]", "search.n_trials=1")
    scripted, study = scripted_search(resolved, lambda resolved, stored, trial: pytest.fail("trained"))
    study.sampler = Interrupted()
    with pytest.raises(interrupts.Interrupted), interrupts.handled():
        scripted.run()
    assert [trial.state for trial in study.get_trials()] == [TrialState.FAIL, TrialState.WAITING]
