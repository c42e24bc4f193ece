"""The report of a study: written at its end, and again from what the study keeps."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest

from grpo_mlflow.algorithm.statistics import Estimate
from grpo_mlflow.cli import report as command
from grpo_mlflow.errors import UserError
from grpo_mlflow.search import outcome, records, rights, study_page
from grpo_mlflow.search import study as studies
from grpo_mlflow.search.confirm import Finalist
from grpo_mlflow.search.storage import open_storage
from tests.support.pages import Parsed
from tests.support.small_studies import load, search, study_config

SPACE = "search.space=train.lr=[1e-3,2e-3]"


def test_the_page_written_again_is_that_of_the_end(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ("train.iterations=2", "train.lr_warmup_steps=0")
    resolved = study_config(store, tmp_path, SPACE, "search.sampler=grid", *short)
    search(resolved)
    study = load(resolved)
    said = capsys.readouterr().out
    words = [f"tracking.uri={store}", f"search.storage={resolved.config.search.storage}"]
    parent = study.user_attrs["parent_run_id"]
    (path,) = tmp_path.rglob("study/report.html")
    before = path.read_text()
    for named in (["--study_name", "grpo"], ["--run", parent]):
        path.unlink()
        command.main([*named, *words])
        assert capsys.readouterr().out == f"{path}\n"
        assert path.read_text() == before
    page = Parsed(before)
    verdict = next(line for line in said.splitlines() if line.startswith("verdict")).removeprefix("verdict").strip()
    assert verdict in page.said
    assert f"grpo train --config {path.parent / 'best_config.yaml'} seed=1 tracking.uri={store}" in page.said
    with pytest.raises(UserError, match=r"study_name = 'other': is not in the storage; allowed: .* \(grpo\)"):
        command.main(["--study_name", "other", *words])

    records.keep(study, "outcome", None)  # as an earlier version has left it
    command.main(["--study_name", "grpo", "--output", str(tmp_path / "old.html"), *words])
    old = Parsed((tmp_path / "old.html").read_text())
    assert "no trial was measured again" in old.said
    assert old.mark("pass@1", "finished") == page.mark("pass@1", "finished")
    assert path.read_text() == before


def test_an_outcome_is_kept_as_it_was(tmp_path: Path) -> None:
    study = optuna.create_study(storage=f"sqlite:///{tmp_path}/a.db", study_name="a", direction="maximize")
    assert outcome.kept(study) is None
    study.add_trials([optuna.trial.create_trial(value=value) for value in (0.1, 0.2)])
    estimate = Estimate(0.2, 0.1, 0.3)
    one = Finalist(study.trials[1], estimate, (0.25, 1.0), 4, retrained=(0.5, 0.75), ranked_by_these=True)
    own = Finalist(study.trials[0], estimate, (0.0, 1 / 3), 4, fresh=False)
    outcome.keep(study, outcome.Outcome(7, [one, own], own))
    again = outcome.kept(optuna.load_study(storage=f"sqlite:///{tmp_path}/a.db", study_name="a"))
    assert again is not None
    assert (again.total, list(again.finalists), again.own) == (7, [one, own], own)
    outcome.keep(study, outcome.Outcome(2))
    assert outcome.kept(study) == outcome.Outcome(2, [], None)


def test_a_study_without_a_run_is_one_line(store: str, tmp_path: Path) -> None:
    storage = open_storage(f"sqlite:///{tmp_path}/a.db")
    study = optuna.create_study(storage=storage, study_name="early", direction="maximize")
    right = rights.take(storage, "early")
    assert right is not None
    with right.held(), pytest.raises(UserError, match=r"is not in the storage; allowed: one that it has \(early\)"):
        study_page.load("early (leader 1)", storage)
    with pytest.raises(UserError, match=r"study 'early': has no run in MLflow yet"):
        study_page.write_again(study_page.load("early", storage), study_config(store, tmp_path).config, "")
    assert studies.begun_trials(study) == []
