"""MLflow's variables name the experiment and the run where nobody else does."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_mlflow.config import resolve

EXPERIMENT, RUN = "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_NAME"


@pytest.fixture(autouse=True)
def _variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EXPERIMENT, "from the variable")
    monkeypatch.setenv(RUN, "first try")


def test_they_win_over_defaults() -> None:
    found = resolve("tiny")
    assert (found.config.tracking.experiment, found.config.tracking.run_name) == ("from the variable", "first try")
    assert found.origins["tracking.experiment"] == f"variable {EXPERIMENT}"


def test_what_is_given_wins_over_them(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: tiny\ntracking: {experiment: from the file}\n")
    assert resolve(str(tmp_path / "mine.yaml")).config.tracking.experiment == "from the file"
    found = resolve("tiny", ["tracking.experiment=typed", "tracking.run_name=null"])
    assert (found.config.tracking.experiment, found.config.tracking.run_name) == ("typed", None)


def test_an_empty_one_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EXPERIMENT, "")
    assert resolve("tiny").config.tracking.experiment == "grpo"


def test_a_stored_config_keeps_its_names_but_for_a_run_of_its_own() -> None:
    """A resumed run and the trials of a study are where they are; an evaluation of a run is another run."""
    stored = {"generation": {"backend": "local"}, "tracking": {"experiment": "as then", "run_name": "then"}}
    assert resolve(base=stored, origin="run").config.tracking.experiment == "as then"
    found = resolve(base=stored, origin="run", named_anew=True).config.tracking
    assert (found.experiment, found.run_name) == ("from the variable", "first try")
    typed = resolve("", ["tracking.experiment=typed"], stored, "run", named_anew=True)
    assert typed.config.tracking.experiment == "typed"
