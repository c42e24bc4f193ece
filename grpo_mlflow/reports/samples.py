"""The same problems' completions at different evaluations, to compare them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grpo_mlflow.reports.charts import thinned
from grpo_mlflow.reports.records import Table

_MOST_PROBLEMS, _MOST_EVALUATIONS = 24, 8
_SHOWN = ("completion", "answer", "success", "reward", "tokens", "finish")
_TURNS = {
    (False, True): "wrong, then right",
    (True, False): "right, then wrong",
    (False, False): "wrong first and last",
    (True, True): "right first and last",
}


def compared(tables: Mapping[int, Table]) -> list[dict[str, Any]]:
    """Return problems with their completions at up to 8 evaluations, those that have changed first.

    A problem counts if the first and the last evaluation have it.
    """
    if not tables:
        return []
    steps = sorted(tables)
    chosen = [steps[i] for i in thinned(len(steps), _MOST_EVALUATIONS)]
    by_step = {step: _by_problem(tables[step]) for step in chosen}
    first, last = by_step[chosen[0]], by_step[chosen[-1]]
    order = list(_TURNS)
    found = []
    for problem, row in last.items():
        if problem not in first:
            continue
        turn = (bool(first[problem]["success"]), bool(row["success"]))
        answers = [
            {"iteration": step, **{name: rows[problem].get(name) for name in _SHOWN}}
            for step, rows in by_step.items()
            if problem in rows
        ]
        content = {"id": problem, "prompt": str(row["prompt"]), "turn": _TURNS[turn], "answers": answers}
        found.append((order.index(turn), content))
    found.sort(key=lambda each: each[0])  # stable: within a turn the problems keep their order
    return [content for _, content in _spread(found)]


def _spread(found: Sequence[tuple[int, dict[str, Any]]]) -> list[tuple[int, dict[str, Any]]]:
    """Return as many as a page shows, with a share for each turn if there are too many of one."""
    if len(found) <= _MOST_PROBLEMS:
        return list(found)
    share = _MOST_PROBLEMS // len(_TURNS)
    kept = [each for turn in range(len(_TURNS)) for each in [e for e in found if e[0] == turn][:share]]
    rest = [each for each in found if not any(each is other for other in kept)]
    return sorted([*kept, *rest[: _MOST_PROBLEMS - len(kept)]], key=lambda each: each[0])


def _by_problem(table: Table) -> dict[str, dict[str, Any]]:
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    return {str(row.get("problem", row.get("prompt"))): row for row in rows}
