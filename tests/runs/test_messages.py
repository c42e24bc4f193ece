"""The commands that a run shows find it again, and are shown where they can work."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_mlflow.runs import messages
from grpo_mlflow.tracking import NullTracker
from grpo_mlflow.training.progress import Progress
from tests.support.small_runs import small

RUN_ID = 32 * "a"
STORE = "sqlite:////there/mlflow.db"


class Stored(NullTracker):
    url = STORE  # type: ignore[assignment]


def ended(*overrides: str, most: int | None = None) -> dict[str, str]:
    """Return the last lines of a run of 4 iterations by their labels."""
    config = small("sqlite:///mlflow.db", *overrides).config
    text = messages.conclude(config, Progress(), Stored(RUN_ID, Path("/there/run")), most)
    return {line[:18].strip(): line[18:] for line in text.splitlines()}


@pytest.mark.parametrize(
    ("most", "further"),
    [(None, "8"), (20, "8"), (7, "7"), (5, "5"), (4, "")],
)
def test_a_replay_goes_on_as_far_as_there_are_rollouts(most: int | None, further: str) -> None:
    command = ended(most=most).get("continue", "")
    assert command.rpartition("train.iterations=")[2] == further


def test_the_store_is_named_as_it_was_given() -> None:
    assert f"resume={RUN_ID} tracking.uri=sqlite:///mlflow.db train" in ended()["continue"]
    assert f"resume={RUN_ID} train" in ended("tracking.uri=null")["continue"]


def test_under_mlflow_run_the_store_is_named_that_only_this_process_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder is not that of the person, nor is what its environment has."""
    monkeypatch.setenv("MLFLOW_RUN_ID", RUN_ID)
    for given in ("tracking.uri=null", "tracking.uri=sqlite:///mlflow.db"):
        assert f"resume={RUN_ID} tracking.uri={STORE} train" in ended(given)["continue"]


def test_a_run_that_is_not_kept_shows_no_commands() -> None:
    text = messages.conclude_unkept(small("sqlite:///mlflow.db").config, Progress())
    assert "training time" in text
    assert not {"grpo ", "mlflow", "files "} & {word for word in ("grpo ", "mlflow", "files ") if word in text}
    assert messages.how_to_resume(small("").config, "smoke", Stored(RUN_ID, Path()), "stopped") == "\nsmoke stopped"
