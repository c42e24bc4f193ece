"""The description of a run in MLflow: what came of it first, then links that lead somewhere and commands that work."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import mlflow
import pytest

from grpo_mlflow import runs, tracking
from grpo_mlflow.cli import commands
from grpo_mlflow.errors import Pruned, UserError
from grpo_mlflow.runtime import interrupts
from tests.support.small_runs import newest, small
from tests.support.small_studies import search, study_config
from tests.support.stores import Stores

LINK = re.compile(r"\[([^]]+)\]\(#/experiments/(\d+)/runs/([0-9a-f]{32})\?workflowType=machine_learning\)")
COMMAND = re.compile(r"`(?:\S+/)?(grpo \w+ [^`]+)`")


def note(store: str, run_id: str) -> str:
    text: str = mlflow.MlflowClient(store).get_run(run_id).data.tags[tracking.NOTE]
    return text


def commands_of(text: str) -> list[list[str]]:
    return [shlex.split(command)[1:] for command in COMMAND.findall(text)]


def links_of(text: str, store: str) -> dict[str, str]:
    """Return the kinds of the runs behind the links, by their texts."""
    client, found = mlflow.MlflowClient(store), {}
    for label, experiment, run_id in LINK.findall(text):
        run = client.get_run(run_id)
        assert run.info.experiment_id == experiment
        found[label] = run.data.tags["grpo.kind"]
    return found


def test_a_training_run_says_what_it_came_to(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    finished = runs.train(small(store))
    told, text = capsys.readouterr().out, note(store, finished.run_id)
    printed = re.search(r"held-out pass@1 +(.*?)   \(95%.*\nchange +(.*)\n", told)
    assert printed is not None
    assert text.splitlines()[0] == f"**Held-out pass@1 {printed[1]}**: {printed[2]} (95% intervals, 5 problems)."
    wanted = {"train": f"resume={finished.run_id}", "evaluate": finished.run_id}
    found = commands_of(text)
    assert {words[0] for words in found} == {*wanted}
    for words in found:
        commands.main(words)


@pytest.mark.parametrize(
    ("error", "first", "further"),
    [
        (interrupts.Interrupted(2), "**Training stopped", "train resume="),
        (Pruned("trial 3 at iteration 8"), "**Pruned: trial 3 at iteration 8**", ""),
        (UserError("the disk is gone"), "**Training failed", "`the disk is gone`"),
    ],
)
def test_a_run_that_ends_early_says_why_and_how_to_go_on(
    store: str, error: BaseException, first: str, further: str, tmp_path: Path
) -> None:
    runs.warmup(small(store))
    parent, said = newest(store), list[str]()

    def fail(progress: object, evaluation: object) -> None:
        if getattr(progress, "iteration", 0) == 4:
            said.append(note(store, newest(store)))  # sent long before
            raise error

    nested = runs.Nested(parent, "trial 3", {})
    with pytest.raises(type(error)):
        runs.train(small(store), trial=runs.Trial(nested, lambda run_id: None, fail))
    text = note(store, newest(store))
    assert text.startswith(first)
    assert further in text
    assert said[0].startswith("**Under way**: tiny learns arithmetic, 4 iterations of 4 problems x 4 rollouts.")
    assert links_of(said[0], store) == {"the study": "warmup"}


def test_a_description_of_somebodys_own_stays(store: str) -> None:
    client = mlflow.MlflowClient(store)

    def describe(progress: object, evaluation: object) -> None:
        if getattr(progress, "iteration", 0) == 4:
            client.set_tag(newest(store), tracking.NOTE, "what I think of it")

    runs.warmup(small(store))
    nested = runs.Nested(newest(store), "trial 3", {})
    finished = runs.train(small(store), trial=runs.Trial(nested, lambda run_id: None, describe))
    assert note(store, finished.run_id) == "what I think of it"


def test_an_evaluation_names_the_run_of_its_model(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    trained = runs.train(small(store, "train.lr=3e-3", "train.iterations=2"))
    client = mlflow.MlflowClient(store)
    commands.main(["evaluate", "--model", trained.run_id, "--checkpoint", "last", f"tracking.uri={store}"])
    run = client.get_run(newest(store))
    name = client.get_run(trained.run_id).info.run_name
    assert name.startswith("arithmetic tiny lr=3e-3 ")
    assert run.info.run_name == f"eval of {name}@iter_002"
    assert run.data.tags["grpo.evaluated_model"] == f"runs:/{trained.run_id}/checkpoints/iter_002"
    text = run.data.tags[tracking.NOTE]
    assert links_of(text, store) == {f"run {trained.run_id}": "train"}
    summary = re.search(r"^(pass@1 .*?)  [0-9.]+s$", capsys.readouterr().out, re.MULTILINE)
    assert summary is not None
    assert text.startswith(f"**{summary[1]}** on arithmetic, 5 problems x 4.")
    (words,) = commands_of(text)
    commands.main(words)
    assert client.get_run(newest(store)).data.metrics["eval/pass_at_1"] == run.data.metrics["eval/pass_at_1"]


def test_the_model_of_another_store_is_named_by_its_folder(store: str, tmp_path: Path, empty_stores: Stores) -> None:
    (tmp_path / "other").mkdir()
    trained = runs.train(small(empty_stores.new(tmp_path / "other"), "train.iterations=2"))
    source = trained.run_dir / "checkpoints" / "iter_002"
    runs.evaluate(small(store), source)
    run = mlflow.MlflowClient(store).get_run(newest(store))
    assert (run.info.run_name, run.info.status) == ("eval of iter_002", "FINISHED")
    assert run.data.tags["grpo.evaluated_model"] == str(source)
    assert links_of(run.data.tags[tracking.NOTE], store) == {}


def test_a_study_says_who_won_and_links_to_it(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("search.n_trials=2", "search.space=train.lr=[1e-4,3e-3]", "search.study_name=my study")
    winner = search(study_config(store, tmp_path, *words))[0]
    told, run_id = capsys.readouterr().out, newest_study(store)
    text = note(store, run_id)
    verdict = re.search(r"^verdict +(.*)$", told, re.MULTILINE)
    assert verdict is not None
    lr = {1e-4: "1e-4", 3e-3: "3e-3"}[winner.trial.params["train.lr"]]
    first = f"**Trial {winner.trial.number} wins: lr={lr}**, pass@1 {winner.confirmed} on {winner.where}; {verdict[1]}."
    assert text.splitlines()[0] == first
    assert links_of(text, store) == {f"trial {number}": "train" for number in (0, 2)}
    assert "- varied: train.lr 0.0001 | 0.003\n" in text
    assert f"viewStateShareKey=grpo-study-my-study-{run_id[:8]})" in text
    assert [words[0] for words in commands_of(text)] == ["train", "evaluate", "optimize", "report"]
    for each in commands_of(text):
        commands.main(each)


def newest_study(store: str) -> str:
    client = mlflow.MlflowClient(store)
    experiment = client.get_experiment_by_name("grpo").experiment_id
    found: str = client.search_runs([experiment], "tags.`grpo.kind` = 'optimize'")[0].info.run_id
    return found
