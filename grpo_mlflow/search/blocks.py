"""The blocks of problems that trials of an ended study are measured on: the first ranks them, the second is reported.

Neither holds problems that were asked before. A small task runs out of those, and then a score is of problems that have
chosen what they measure: it is said to be optimistic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grpo_mlflow import tasks
from grpo_mlflow.config import Resolved, overlay
from grpo_mlflow.tasks import contents


@dataclass(frozen=True, slots=True)
class Block:
    """A block of problems.

    Args:
        name: what runs that ask them are called.
        settings: those of an evaluation that asks them.
        before: the evaluation seeds whose problems are left out: those of the search, and of the block before.
        problems: how many there are.
        fresh: whether none of them was asked before.
        remark: what is to be said of them.
    """

    name: str
    settings: dict[str, Any]
    before: tuple[range, ...]
    problems: int
    fresh: bool
    remark: str | None


def block(resolved: Resolved, number: int) -> Block:
    """Return the first (0) or the second (1) block of a study."""
    search, evaluation = resolved.config.search, resolved.config.eval
    first = search.confirm_seed_start + number * search.confirm_num_ids
    settings = {
        "eval.id_seed_start": first,
        "eval.num_ids": search.confirm_num_ids,
        "eval.replicates": search.confirm_replicates,
        "search.finalists": 0,  # those problems are in use now
    }
    before = (
        range(evaluation.id_seed_start, evaluation.id_seed_start + evaluation.num_ids),
        range(search.confirm_seed_start, first),
    )
    config = overlay(resolved, settings, "confirmation").config
    task = tasks.of(config)
    problems, remark = contents.evaluation_problems(task, config, before)
    fresh = contents.has_fresh(task, config, before)
    said = f"  fresh problems from seed {first}: {remark}" if remark else None
    return Block("final" if number else "confirm", settings, before, len(problems), fresh, said)
