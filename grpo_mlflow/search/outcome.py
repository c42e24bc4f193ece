"""What the confirmation of a study has found, kept in the study: its report can be written again without measuring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from grpo_mlflow.algorithm.statistics import Estimate
from grpo_mlflow.search import records
from grpo_mlflow.search.confirm import Finalist

_KEY = "outcome"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The finalists, the winner first, and the own settings, of a study of `total` trials."""

    total: int
    finalists: Sequence[Finalist] = ()
    own: Finalist | None = None


def keep(study: optuna.Study, found: Outcome) -> None:
    """Keep an outcome in its study."""
    own = None if found.own is None else _content(found.own)
    content = {"total": found.total, "finalists": [_content(each) for each in found.finalists], "own": own}
    records.keep(study, _KEY, content)


def kept(study: optuna.Study) -> Outcome | None:
    """Return the outcome that a study keeps; None of one that has not ended, or that an earlier version has ended."""
    content = records.kept(study).get(_KEY)
    if content is None:
        return None
    trials = study.get_trials(deepcopy=False)
    own = None if content["own"] is None else _finalist(content["own"], trials)
    return Outcome(content["total"], [_finalist(each, trials) for each in content["finalists"]], own)


def _content(finalist: Finalist) -> dict[str, Any]:
    selected = finalist.selected
    return {
        "trial": finalist.trial.number,
        "selected": [selected.value, selected.low, selected.high],
        "rates": list(finalist.rates),
        "replicates": finalist.replicates,
        "retrained": list(finalist.retrained),
        "ranked_by_these": finalist.ranked_by_these,
        "fresh": finalist.fresh,
    }


def _finalist(content: Mapping[str, Any], trials: Sequence[FrozenTrial]) -> Finalist:
    return Finalist(
        *(trials[content["trial"]], Estimate(*content["selected"]), tuple(content["rates"]), content["replicates"]),
        retrained=tuple(content["retrained"]),
        ranked_by_these=content["ranked_by_these"],
        fresh=content["fresh"],
    )
