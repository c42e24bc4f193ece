"""Whole studies of small trials: what they leave, and that failing, stopping and joining change nothing."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import mlflow
import optuna
import pytest
from mlflow.entities import Run
from optuna.trial import FrozenTrial, TrialState

from grpo_mlflow import runs, tracking
from grpo_mlflow.algorithm.statistics import rate_interval
from grpo_mlflow.config import OF_EVALUATION, TRAITS, Arguments, Config, Resolved, flatten, overlay, resolve
from grpo_mlflow.errors import ServerFailed, StoreAway, UserError
from grpo_mlflow.runs.session import session
from grpo_mlflow.runs.stored import Stored, find, resolve_evaluation
from grpo_mlflow.runtime import interrupts
from grpo_mlflow.runtime.console import Console
from grpo_mlflow.search import champion, records, report, settings, space_file, trial_records
from grpo_mlflow.search import study as studies
from grpo_mlflow.search.confirm import Finalist
from grpo_mlflow.search.space import Space
from grpo_mlflow.search.storage import open_storage
from grpo_mlflow.search.study import final_trials, judged, slots
from grpo_mlflow.search.trials import Search, Train
from grpo_mlflow.training.evaluation import Evaluation
from grpo_mlflow.training.progress import Progress
from tests.support.fake_server import Answer, FakeServer, Fault
from tests.support.pages import Parsed
from tests.support.paths import ROOT
from tests.support.small_runs import SMALL, curves
from tests.support.small_studies import STUDY, load, search, study_config

RANGE = "search.space=train.lr='{low: 1e-5, high: 1e-2, log: true}'"


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
    page = Parsed((folder / "report.html").read_text())
    finished = page.mark("pass@1", "finished")
    assert finished["y"] == [trial.value for trial in final_trials(load(resolved))]
    again = page.mark("pass@1", f"on {finalists[0].where.partition(',')[0]}")
    assert again["y"][:2] == [finalist.confirmed.value for finalist in finalists]
    for finalist in finalists:
        assert f"trial {finalist.trial.number}: pass@1 {finalist.selected} in the search" in page.said
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
    assert best.eval == settings.pinned(resolved).config.eval
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
    assert [run.info.status for run in all_runs(store, "train")] == ["FINISHED"]  # the other is refused before its run
    assert all_runs(store, "optimize")[0].info.status == "FINISHED"


def test_pruned_trials_show_as_pruned(store: str, tmp_path: Path) -> None:
    """Threshold ends every trial whose pass@1 is below .02, which a learning rate of .1 sees to."""
    words = ["search.space=train.lr=[1e-3,0.1]", "search.sampler=grid", "search.pruner=threshold"]
    resolved = study_config(store, tmp_path, *words, "train.iterations=12", "model.tiny.steps=400")
    search(resolved)
    states = {trial.params["train.lr"]: trial.state for trial in final_trials(load(resolved))}
    assert states == {1e-3: TrialState.COMPLETE, 0.1: TrialState.PRUNED}
    runs = {run.data.params["train.lr"]: run for run in all_runs(store, "train")}
    assert (runs["0.1"].info.status, runs["0.1"].data.tags["optuna.state"]) == ("KILLED", "PRUNED")
    assert (runs["0.001"].info.status, runs["0.001"].data.tags["optuna.trial"]) == ("FINISHED", "0")


def test_the_untrained_model_is_evaluated_once_where_it_can_be(store: str, tmp_path: Path) -> None:
    """A mark in the shared evaluation shows which trials use it."""
    words = ["search.space=train.lr=[1e-3,2e-3] model.dtype=[float32,bfloat16]", "search.sampler=random"]
    search(study_config(store, tmp_path, *words, "search.n_trials=1"))
    (parent,) = all_runs(store, "optimize")
    path = Path(parent.info.artifact_uri) / "study" / "baseline.jsonl"
    path.write_text(re.sub(r'"reward": [0-9.]+', '"reward": 77.0', path.read_text()))
    search(study_config(store, tmp_path, *words, "search.n_trials=9"))
    assert [run.info.run_name for run in all_runs(store, "evaluate")].count("baseline") == 1
    client = mlflow.MlflowClient(store)
    later = all_runs(store, "train")[1:]
    assert {run.data.params["model.dtype"] for run in later} == {"float32", "bfloat16"}
    for run in later:
        first = client.get_metric_history(run.info.run_id, "eval/mean_at_1")[0]
        assert (first.step, first.value == 77.0) == (0, run.data.params["model.dtype"] == "float32")


def test_trials_that_learn_nothing_score_the_same_whatever_they_vary(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """How a model is evaluated belongs to the study: what a trial trains with changes nothing about it."""
    varied = "generation.temperature=[0.7,1.3] seed=[3,4] generation.max_new_tokens=[2] generation.top_p=[0.6]"
    words = ["search.sampler=grid", "model.tiny.steps=400", "train.lr=1e-12", f"search.space={varied}"]
    words = [*words, "train.iterations=2", "train.lr_warmup_steps=0", "data.arithmetic.digits=2"]
    words = [*words, "eval.num_ids=32", "search.confirm_num_ids=32"]
    resolved = study_config(store, tmp_path, *words)
    finalists = search(resolved)
    trials = final_trials(load(resolved))
    for name, settings_of_all in (("seed", {3, 4}), ("generation.temperature", {0.7, 1.3})):
        assert {trial.params[name] for trial in trials} == settings_of_all
    (rates,) = {tuple(studies.curve(trial)[2]) for trial in trials}
    assert len({*rates}) > 1
    (rates,) = {finalist.rates for finalist in finalists}
    assert len({*rates}) > 1
    (verdict,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("verdict")]
    assert re.search(r"against the second \+0\.000 .*: not distinguishable, within the noise of problems$", verdict)
    flat = flatten(resolved.config.model_dump(mode="json"))
    for run in all_runs(store, "train"):  # what an evaluation followed stands in the trial's own run
        assert {own: run.data.params[own] for own in OF_EVALUATION} == {
            own: str(flat[other]) for own, other in OF_EVALUATION.items()
        }


def test_a_study_that_an_earlier_version_began_goes_on_where_its_trials_were_evaluated_alike(
    store: str, tmp_path: Path
) -> None:
    resolved = study_config(store, tmp_path, "search.space=train.lr=[1e-3]")
    storage = open_storage(resolved.config.search.storage)

    def opened(space: str) -> optuna.Study:
        return studies.open_study(storage, settings.pinned(resolved).config, space_file.load(space, resolved))

    study = opened("train.lr=[1e-3]")
    begun = {key: value for key, value in records.kept(study)["config"].items() if key not in OF_EVALUATION}
    records.keep(study, "config", begun | {"eval.temperature": "null"})
    assert opened("train.lr=[1e-3]")._study_id == study._study_id
    for key in ("generation.temperature=[0.7,1.0]", "seed=[1,2]"):
        with pytest.raises(UserError, match=f"^search.space: {key.partition('=')[0]}: .* evaluated each trial"):
            opened(f"train.lr=[1e-3] {key}")


@pytest.mark.parametrize("key", ["generation.temperature", "data.arithmetic.digits"])
def test_trials_that_were_evaluated_differently_are_not_gone_on_with_when_the_space_no_longer_varies_it(
    key: str, store: str, tmp_path: Path
) -> None:
    resolved = study_config(store, tmp_path, "search.space=train.lr=[1e-3]")
    storage, space = open_storage(resolved.config.search.storage), space_file.load("train.lr=[1e-3]", resolved)
    study = studies.open_study(storage, settings.pinned(resolved).config, space)
    records.keep(study, "config", records.kept(study)["config"] | {"eval.temperature": "null"})
    choice = optuna.distributions.CategoricalDistribution((1, 2))
    study.add_trial(optuna.trial.create_trial(params={"train.lr": 1}, distributions={"train.lr": choice}, value=0.5))
    assert studies.open_study(storage, settings.pinned(resolved).config, Space(()))._study_id == study._study_id
    study.add_trial(optuna.trial.create_trial(params={key: 2}, distributions={key: choice}, value=0.5))
    with pytest.raises(
        UserError, match=f"^search.space: {key}: .* evaluated each trial with its own; allowed: another"
    ):
        studies.open_study(storage, settings.pinned(resolved).config, space)


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
    best = studies.ranked(final_trials(load(resolved)))[0].number
    name = "final" if best else "confirm"  # on problems that have not chosen between the two
    assert measured[f"{name}-{winner.trial.number}"] == parent.data.metrics["study/confirmed_pass_at_1"]
    assert measured[f"{name}-0"] == parent.data.metrics["study/own_pass_at_1"]
    assert measured[f"confirm-{winner.trial.number}"] >= measured[f"confirm-{best}"]
    said = capsys.readouterr().out
    assert winner.trial.number == 0 or "against your own settings" in said


def test_the_winners_config_is_that_of_its_own_run(store: str, tmp_path: Path) -> None:
    """A study goes on with a larger space, and the config now has another value of what varies."""
    words = ["search.n_trials=1", "train.iterations=3"]
    narrow = [*words, "search.space=train.lr=[1e-3]", "train.scale_rewards=group", "search.finalists=0"]
    assert search(study_config(store, tmp_path, *narrow)) == []
    wide = [*words, "search.space=train.lr=[1e-3] train.scale_rewards=[group,none]", "train.scale_rewards=none"]
    (winner,) = search(study_config(store, tmp_path, *wide))
    (confirmed,) = [run for run in all_runs(store, "evaluate") if run.info.run_name == "confirm-0"]
    assert confirmed.data.params["train.scale_rewards"] == "group"
    (parent,) = all_runs(store, "optimize")
    again = resolve(str(Path(parent.info.artifact_uri) / "study" / "best_config.yaml"))
    assert again.config.train.scale_rewards == "group"
    assert (again.config.search, again.config.tracking.run_name) == (Config().search, None)
    finished = runs.train(again)
    assert curves(store, finished.run_id) == curves(store, winner.trial.user_attrs["run_id"])


def test_a_winner_whose_run_was_deleted_is_left_out(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["search.space=train.lr=[1e-3,2e-3]", "search.sampler=grid", "train.iterations=2"]
    words = [*words, "train.lr_warmup_steps=0"]
    resolved = study_config(store, tmp_path, *words, "search.finalists=0")
    search(resolved)
    best, second = studies.ranked(final_trials(load(resolved)))
    mlflow.MlflowClient(store).delete_run(best.user_attrs["run_id"])
    (winner,) = search(study_config(store, tmp_path, *words, "search.finalists=2"))
    assert winner.trial.number == second.number
    assert capsys.readouterr().err.count(f"trial {best.number}: left out: its run") == 1


def test_what_is_missing_of_each_trial_is_said_once_and_without_any_there_is_no_winner(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["search.space=train.lr=[1e-3,2e-3,3e-3]", "search.n_trials=3", "search.sampler=random", "train.lr=1e-3"]
    words = [*words, "train.iterations=2", "train.lr_warmup_steps=0"]
    search(study_config(store, tmp_path, *words, "search.finalists=0"))
    client, found = mlflow.MlflowClient(store), final_trials(load(study_config(store, tmp_path)))
    ids = [trial.user_attrs["run_id"] for trial in found]
    client.delete_run(ids[0])  # the own settings
    shutil.rmtree(Path(client.get_run(ids[1]).info.artifact_uri) / "checkpoints")
    for name in ("config", "checkpoints"):  # a checkpoint holds the config as well
        shutil.rmtree(Path(client.get_run(ids[2]).info.artifact_uri) / name)
    capsys.readouterr()
    with pytest.raises(UserError, match=r"^study 'grpo': none of its finished trials is left to confirm.*; allowed: "):
        search(study_config(store, tmp_path, *words))
    said = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert sorted(said) == [
        f"warning: trial 0: left out: its run {ids[0]} was deleted in MLflow",
        f"warning: trial 1: left out: run {ids[1]}: its checkpoint is gone from MLflow",
        f"warning: trial 2: left out: run {ids[2]}: has no artifact config/resolved.yaml",
    ]
    (parent,) = all_runs(store, "optimize")
    assert parent.info.status == "FAILED"
    assert (Path(parent.info.artifact_uri) / "study" / "trials.csv").is_file()


def test_a_task_without_fresh_problems_has_an_optimistic_winner(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its 7 evaluation problems are all asked in the search."""
    words = ["search.space=train.lr=[1e-3,2e-3]", "search.sampler=grid", "eval.num_ids=64", "train.iterations=2"]
    winner, _ = search(study_config(store, tmp_path, *words, "train.lr_warmup_steps=0"))
    assert not winner.fresh
    said = capsys.readouterr().out
    assert said.count("the task has no fresh problems") == 2  # each set of problems, once
    assert "on 5 problems that chose the winner, as the task has no fresh ones: optimistic" in said
    assert "on fresh problems" not in said
    (parent,) = all_runs(store, "optimize")
    assert parent.data.tags["study.confirmed_on"] == winner.where
    page = (Path(parent.info.artifact_uri) / "study" / "report.html").read_text()
    assert "the task has no problems left that have chosen nothing" in page
    measured = [run for run in all_runs(store, "evaluate") if run.info.run_name != "baseline"]
    assert {run.data.tags["study.problems"] for run in measured} == {"asked before"}
    version = mlflow.MlflowClient(store).get_model_version_by_alias("grpo", "champion")
    assert winner.where in version.description


def test_a_deleted_parent_or_experiment_is_one_line_with_the_remedy(store: str, tmp_path: Path) -> None:
    resolved = study_config(store, tmp_path, "search.space=train.lr=[1e-3]")
    with session(resolved, "optimize") as (_, tracker, _):
        parent = tracker.run_id
    space = space_file.load("train.lr=[1e-3]", resolved)
    study = studies.open_study(open_storage(resolved.config.search.storage), settings.pinned(resolved).config, space)
    study.set_user_attr("parent_run_id", parent)
    client = mlflow.MlflowClient(store)
    experiment = client.get_run(parent).info.experiment_id
    client.delete_experiment(experiment)
    with pytest.raises(UserError, match=f"its parent run {parent} .* was deleted; .*mlflow runs restore --run-id"):
        search(resolved)
    with pytest.raises(UserError, match=f"deleted in MLflow; .*experiments restore --experiment-id {experiment}"):
        search(study_config(store, tmp_path, "search.space=train.lr=[1e-3]", "search.study_name=another"))


@pytest.mark.parametrize(
    ("study", "model"),
    [("grpo", "grpo"), ("lr/sweep", "lr-sweep"), ("a:b", "a-b"), ("it's 5%@home", "it-s 5--home"), ("..", "study-")],
)
def test_a_champion_has_a_name_that_the_registry_takes(study: str, model: str, store: str) -> None:
    assert champion.model_name(study) == model
    assert champion.address(study) == f"models:/{model}@champion"
    mlflow.MlflowClient(store).create_registered_model(model)


def test_two_studies_of_one_name_leave_each_other_their_champions(store: str, tmp_path: Path) -> None:
    resolved = study_config(store, tmp_path)
    client, said = mlflow.MlflowClient(store), []
    for _ in range(2):
        with session(resolved, "optimize") as (_, tracker, _):
            with session(resolved, "train", nested=runs.Nested(tracker.run_id, "trial")) as (_, trained, _):
                pass
            said.append(tracking.study_of_alias(client, "grpo", "champion"))
            tags = {"description": "best", tracking.STUDY_TAG: tracker.run_id}
            tracker.register("grpo", "champion", trained.run_id, "checkpoints/iter_002", tags)
    first, second = all_runs(store, "optimize")
    assert said == [None, first.info.run_id]
    old = client.get_model_version_by_alias("grpo", tracking.alias_of("champion", first.info.run_id))
    new = client.get_model_version_by_alias("grpo", "champion")
    assert [version.tags[tracking.STUDY_TAG] for version in (old, new)] == [first.info.run_id, second.info.run_id]
    assert new.description == "best"


def test_own_settings_can_win_and_it_is_said() -> None:
    def finalist(number: int, *rates: float, retrained: tuple[float, ...] = ()) -> Finalist:
        trial = optuna.trial.create_trial(state=TrialState.COMPLETE, value=0.5)
        trial.number = number
        return Finalist(trial, rate_interval(rates, 1), rates, 1, retrained)

    best, own = finalist(1, 1.0, 0.0, 0.0, 0.0), finalist(0, 1.0, 1.0, 0.0, 0.0)
    assert "those you started from: none was better" in report.summary(1, [], 0, [own, best], own)
    ones, zeros = (1.0,) * 40, (0.0, 1.0) * 20
    sure = finalist(2, *ones), finalist(3, *zeros)
    assert "beyond the noise of problems" in report.summary(1, [], 0, sure, None)
    seeds = finalist(2, *ones, retrained=(0.9, 0.2)), finalist(3, *zeros, retrained=(0.5, 0.5))
    assert "within the noise of problems and training seeds" in report.summary(1, [], 0, seeds, None)


def test_a_study_that_is_ended_again_logs_its_result_once(store: str, tmp_path: Path) -> None:
    resolved = study_config(store, tmp_path, "search.space=train.lr=[1e-4]", "search.n_trials=1", "train.iterations=1")
    for _ in range(2):
        search(resolved)
    found = curves(store, load(resolved).user_attrs["parent_run_id"])
    assert [step for step, _ in found["study/confirmed_pass_at_1"]] == [1]


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
    client = mlflow.MlflowClient(store)
    [model] = client.search_logged_models([all_runs(store, "optimize")[0].info.experiment_id])  # of no other trial
    assert (model.source_run_id, model.tags["grpo.checkpoint"]) == (stored.run_id, stored.checkpoint.path.name)
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "grpo", "version": 1}]
    about = client.get_model_version_by_alias("grpo", "champion").description
    assert model.tags["mlflow.note.content"].startswith(about)


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
    version = mlflow.MlflowClient(store).get_model_version_by_alias("grpo", "champion")
    assert version.run_id == winner.typical.run_id
    assert version.run_id in {run.info.run_id for run in again}
    own = sum(winner.typical.rates) / len(winner.typical.rates)
    assert version.tags["confirmed_score"].startswith(f"{own:.3f} [")
    assert f"2 seeds: {scores[0]:.3f} to {scores[1]:.3f}" in version.description


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
    chosen = judged(rates, objective, window)
    assert len(chosen) == 2
    assert sum(chosen) / 2 == expected


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


def test_a_study_of_an_earlier_version_goes_on_with_the_correction_that_it_had(store: str, tmp_path: Path) -> None:
    begun = study_config(store, tmp_path, "search.space=train.lr=[1e-3]")
    space, storage = space_file.load("train.lr=[1e-3]", begun), open_storage(begun.config.search.storage)
    study = studies.open_study(storage, begun.config, space)
    then = {key: text for key, text in records.kept(study)["config"].items() if "importance_sampling" not in key}
    records.keep(study, "config", {**then, "train.sampler_correction_cap": "null"})
    studies.open_study(storage, study_config(store, tmp_path, "train.importance_sampling_mode=none").config, space)
    with pytest.raises(UserError, match=r'train\.importance_sampling_mode = "token_truncate": .* begun with "none"'):
        studies.open_study(storage, begun.config, space)


def test_a_study_notes_what_its_trials_must_have_in_common(store: str, tmp_path: Path) -> None:
    begun = study_config(store, tmp_path, "search.space=train.lr=[1e-3]")
    space, storage = space_file.load("train.lr=[1e-3]", begun), open_storage(begun.config.search.storage)
    study = studies.open_study(storage, begun.config, space)
    assert set(records.kept(study)["config"]) == {key for key, traits in TRAITS.items() if traits.compared}
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
        [sys.executable, "-m", "grpo_mlflow", "optimize", *words],
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
    assert [len(trials) for trials in slots(load(resolved)).values()] == [1, 1]


@pytest.mark.parametrize("after", [None, 0.5], ids=["its process died", "its process is about to sign"])
def test_a_study_that_was_created_but_not_signed_is_continued(store: str, tmp_path: Path, after: float | None) -> None:
    words = ("search.space=train.lr=[1e-3,2e-3]", "search.sampler=grid")
    resolved = study_config(store, tmp_path, *words)
    space = space_file.load(resolved.config.search.space, resolved)
    storage = open_storage(resolved.config.search.storage)
    made = optuna.create_study(study_name="grpo", storage=storage, direction="maximize")
    if after is None:
        assert records.kept(studies.open_study(storage, resolved.config, space)).keys() == {"config", "grid"}
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


class Lacking(optuna.samplers.RandomSampler):
    """Needs a package once it has something to learn from."""

    def sample_independent(self, study: optuna.Study, trial: FrozenTrial, *which: Any) -> Any:
        if trial.number >= 3:
            raise ModuleNotFoundError("No module named 'learning'", name="learning")
        return super().sample_independent(study, trial, *which)


def test_a_sampler_that_lacks_a_package_is_told_before_the_first_trial(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grpo_mlflow.search.choices.sampler", lambda config, slot: Lacking())
    named = "search.sampler = 'tpe': No module named 'learning'; needed: pip install learning"
    with pytest.raises(UserError, match=f"^{re.escape(named)}$"):
        search(study_config(store, tmp_path, RANGE, "search.sampler=tpe"))
    assert open_storage(f"sqlite:///{tmp_path}/optuna.db").get_all_studies() == []


def test_workers_propose_what_one_process_does(store: str, tmp_path: Path) -> None:
    """Two take trials in turn; the second one ends first."""

    def proposed(folder: str, workers: int) -> list[dict[str, Any]]:
        resolved = study_config(store, tmp_path, RANGE, "search.sampler=random", "search.n_trials=6")
        resolved = overlay(resolved, {"search.storage": f"journal:{tmp_path}/{folder}"}, "test")
        begun: list[runs.Trial] = []

        def train(resolved: Resolved, stored: object, trial: runs.Trial) -> None:
            begun.append(trial)
            if len(begun) < workers:
                scripted_search(resolved, train)[0]._run_one()
            raise UserError("no result is needed")

        scripted, study = scripted_search(resolved, train)
        scripted.run()
        return [trial.params for trial in final_trials(study)]

    alone = proposed("alone", 1)
    assert len({params["train.lr"] for params in alone}) == 6
    assert proposed("beside", 2) == alone


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
    assert [trial.state for trial in study.get_trials()] == [TrialState.WAITING]


class Rates(Evaluation):
    """An evaluation of which only pass@1 of each problem is known: its `ks`."""

    def success_rates(self, k: int = 1) -> list[float]:
        return [float(rate) for rate in self.ks]

    def summary(self) -> str:
        return "scripted"


def scripted_train(*evaluations: tuple[int, ...]) -> Train:
    """Return what a trial does that has these pass@1 of each problem after iteration 1, 2 and so on."""

    def train(resolved: Resolved, stored: object, trial: runs.Trial) -> None:
        trial.on_start(f"{trial.nested.name.split()[1]:0>32}")
        assert trial.on_evaluation is not None
        for step, rates in enumerate(evaluations, 1):
            trial.on_evaluation(Progress(iteration=step), Rates((), rates))

    return train


@pytest.mark.parametrize(("objective", "shown"), [("best", "0.750"), ("mean", "0.333"), ("last", "0.000")])
def test_what_is_shown_of_a_trial_is_what_it_is_ranked_by(
    objective: str, shown: str, store: str, tmp_path: Path
) -> None:
    words = ["search.space=train.lr=[1e-3]", "search.n_trials=1", f"search.objective={objective}"]
    resolved = study_config(store, tmp_path, *words)
    scripted, study = scripted_search(resolved, scripted_train((1, 1, 1, 0), (0, 0, 1, 0), (0, 0, 0, 0)))
    scripted.run()
    (trial,) = study.get_trials()
    assert trial.value == pytest.approx(float(shown), abs=1e-3)
    assert f"best so far {shown} [" in studies.progress(study, 1, 0.0, resolved.config)
    pruned = optuna.trial.create_trial(state=TrialState.PRUNED, user_attrs=trial.user_attrs)
    assert [trial_records.shown_score(each) for each in (trial, pruned)] == [trial.value] * 2


def test_a_trial_that_is_judged_by_its_best_evaluation_has_those_weights(store: str, tmp_path: Path) -> None:
    words = ["search.sampler=grid", "search.space=train.lr=[1e-2,1e-4]", "search.objective=best", "eval.interval=1"]
    winner, _ = search(study_config(store, tmp_path, *words, "checkpoint.keep_last=1", "search.finalists=2"))
    for trial in final_trials(load(study_config(store, tmp_path))):
        means = {step: sum(rates) for step, rates in studies.curve(trial).items()}
        saved = find(trial.user_attrs["run_id"], store, "best").checkpoint
        assert saved is not None
        assert saved.iteration == max(means, key=lambda step: means[step])
    registered = mlflow.MlflowClient(store).get_model_version_by_alias("grpo", "champion")
    best = find(winner.trial.user_attrs["run_id"], store, "best").checkpoint
    assert best is not None
    assert registered.source.endswith(f"/{best.path.name}")


def test_a_mean_over_evaluations_leaves_out_those_of_other_problems() -> None:
    """An earlier version has counted problems that repeat, and a trial of it goes on."""
    rates = [[1.0, 1.0, 0.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    assert judged(rates, "mean", 3) == [0.5, 1.0]
    assert judged(rates[1:], "mean", 3) == [0.5, 1.0]


SPACE_OF_SIX = "search.space=train.epochs=[1,2] train.aggregation=[grpo,dapo,dr_grpo]"


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_every_trial_has_settings_of_its_own_while_the_space_has_some(
    sampler: str, store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resolved = study_config(store, tmp_path, SPACE_OF_SIX, f"search.sampler={sampler}", "search.n_trials=8")
    scripted, study = scripted_search(resolved, scripted_train((1, 0)))
    scripted._console = Console()
    scripted.run()
    final = final_trials(study)
    assert [trial.state for trial in final] == [TrialState.COMPLETE] * 8
    assert len({tuple(sorted(trial.params.items())) for trial in final}) == 6
    assert sum(studies.DUPLICATE_OF in trial.user_attrs for trial in final) == 2
    given_away = [trial for trial in study.get_trials() if trial.state == TrialState.FAIL]  # what Optuna's tools show
    assert len(study.get_trials()) == 8 + len(given_away) > 8
    for trial in given_away:
        assert re.fullmatch(r"no failure: settings of trial \d, so its place has others", trial.user_attrs["note"])
    assert report.summary(1, final, 8, [], None) == (
        "8 trials: 8 finished, 0 pruned, 0 failed (2 of them share the result of equal settings)"
    )
    assert capsys.readouterr().out.count("the space holds no further settings") == 1


def test_a_copy_that_an_earlier_version_put_back_has_the_settings_that_it_trained_with(
    store: str, tmp_path: Path
) -> None:
    """It noted no `varied`, and the space has since lost a setting and got another."""
    words = ["search.sampler=random", "search.n_trials=1"]
    begun = overlay(study_config(store, tmp_path, *words), {"train.epochs": 1, "train.lr": 1e-3}, "then")
    with session(begun, "train") as (_, run, _):
        pass
    began: list[Resolved] = []

    def train(resolved: Resolved, stored: Stored | None, trial: runs.Trial) -> None:
        began.append(resolved)
        scripted_train((1, 0))(resolved, stored, trial)

    wider = "search.space=train.lr=[1e-3,2e-3] train.epochs=[2,4]"
    scripted, study = scripted_search(study_config(store, tmp_path, *words, wider, "train.epochs=2"), train)
    first = study.ask()
    params = {"train.lr": first.suggest_categorical("train.lr", (1e-3, 2e-3))}
    params["train.kl_coef"] = first.suggest_float("train.kl_coef", 0.02, 0.02)
    first.set_user_attr("slot", 0)
    study.tell(first, state=TrialState.FAIL)
    params = {key: getattr(begun.config.train, key.removeprefix("train.")) for key in params}
    study.enqueue_trial(params, user_attrs={"slot": 0, "killed": 0, "run_id": run.run_id})
    scripted.run()
    (copy,) = final_trials(study)
    assert (copy.number, copy.state, copy.params) == (1, TrialState.COMPLETE, params)
    (resolved,) = began
    assert (resolved.config.train.epochs, resolved.config.train.lr) == (1, 1e-3)


@pytest.mark.parametrize("deleted", [False, True])
def test_a_trial_that_was_interrupted_goes_on_with_its_settings_in_a_larger_space(
    deleted: bool, store: str, tmp_path: Path
) -> None:
    """What its run began with stays, and what the space holds by now is not drawn. Without its run it starts again."""
    words = ["search.sampler=random", "search.n_trials=2"]
    before = study_config(store, tmp_path, *words, "search.space=train.lr=[1e-3,2e-3]", "train.epochs=1")

    def interrupted(resolved: Resolved, stored: object, trial: runs.Trial) -> None:
        with session(resolved, "train", nested=runs.Nested(parent, "trial")) as (_, tracker, _):
            trial.on_start(tracker.run_id)
            raise StoreAway("away")

    with session(before, "optimize") as (_, tracker, _):
        parent = tracker.run_id
    scripted, _ = scripted_search(before, interrupted)
    with pytest.raises(StoreAway):
        scripted.run()
    (interrupted_run,) = all_runs(store, "train")
    if deleted:
        mlflow.MlflowClient(store).delete_run(interrupted_run.info.run_id)
    began: dict[str, tuple[Resolved, Stored | None]] = {}

    def train(resolved: Resolved, stored: Stored | None, trial: runs.Trial) -> None:
        began[trial.nested.tags["optuna.slot"]] = resolved, stored
        scripted_train((1, 0))(resolved, stored, trial)

    wider = "search.space=train.lr=[1e-3,2e-3] train.epochs=[2,4]"
    scripted, study = scripted_search(study_config(store, tmp_path, *words, wider, "train.epochs=2"), train)
    scripted.run()
    first, second = final_trials(study)
    assert [trial.state for trial in (first, second)] == [TrialState.COMPLETE] * 2
    assert first.params.keys() == ({"train.lr", "train.epochs"} if deleted else {"train.lr"})
    assert second.params.keys() == {"train.lr", "train.epochs"}
    settings_then, stored = began["0"]
    assert (stored is None) == deleted
    assert settings_then.config.train.epochs == first.params.get("train.epochs", 1)
