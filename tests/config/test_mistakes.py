"""All mistakes of a command are told at once."""

from __future__ import annotations

import pytest

from grpo_mlflow.cli.train import checked
from grpo_mlflow.errors import ConfigError

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
