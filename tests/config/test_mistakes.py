"""All mistakes of a command are told at once."""

from __future__ import annotations

import pytest

from grpo_mlflow.cli.command import require_all
from grpo_mlflow.cli.train import checked
from grpo_mlflow.config import Resolved, resolve
from grpo_mlflow.errors import ConfigError, UserError

WRONG = (
    "nonsense",
    "seed=[1",
    "model.name=tiny",
    "tracking.uri=${ENV:IS_NOT_SET}",
    "train.lr=fast",
    "data.rollouts_per_problem=1",
)
CONTRADICTING = ("model.train_id=/is/not/there", "model.ref_id=/nor/is/this", "model.nothing=1")
LATE = ("train.loss=python:is.not.there:loss", "data.task=python:is.not.there:Task")


def _lines(*words: str) -> set[str]:
    with pytest.raises(ConfigError) as refused:
        checked(words)
    return set(str(refused.value).splitlines())


@pytest.mark.parametrize("words", [WRONG, CONTRADICTING, LATE])
def test_together_they_are_told_as_each_alone(words: tuple[str, ...]) -> None:
    alone = [_lines(word) for word in words]
    assert all(alone)
    assert _lines(*words) == set().union(*alone)
    assert len(_lines(*words)) == len(words)


def test_a_file_that_cannot_be_read_contradicts_nothing() -> None:
    words = ("--config", "is/not/there.yaml", "generation.async_rollouts=1", "train.lr=fast")
    alone = _lines(*words[:2]) | _lines(*words[3:])
    assert _lines(*words) == alone
    assert len(alone) == 2


def test_mistakes_come_before_what_is_away() -> None:
    def wrong(resolved: Resolved) -> None:
        raise ConfigError("wrong")

    def away(resolved: Resolved) -> None:
        raise UserError("away")

    resolved = resolve("tiny")
    with pytest.raises(ConfigError, match="wrong"):
        require_all(resolved, wrong, away)
    with pytest.raises(UserError, match="away"):
        require_all(resolved, away, wrong)
