"""Records of runs and studies that a report is made of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from grpo_mlflow.reports.records import RunRecord, Setting, Standing, StudyRecord, TrialRecord


def evaluation(iteration: int, rates: list[float], **figures: float) -> dict[str, Any]:
    """Return the figures of an evaluation with these rates of its problems; the interval is no true one."""
    value = sum(rates) / len(rates)
    found = {"pass@1": value, "pass@1_low": value - 0.1, "pass@1_high": value + 0.1, "success_rate_all": value}
    return {"iteration": iteration, **found, "tasks": float(len(rates)), "replicates": 4.0, **figures}


def table(*rows: tuple[str, str, str, bool]) -> dict[str, Any]:
    """Return a table of completions; each row is a problem, its prompt, a completion, whether that is right."""
    columns = ["prompt", "completion", "answer", "success", "reward", "tokens", "finish", "problem"]
    data = [[prompt, text, text, right, float(right), 3, "stop", problem] for problem, prompt, text, right in rows]
    return {"columns": columns, "data": data}


def run_record(**changes: Any) -> RunRecord:
    """Return a run of two evaluations of four problems, one of which it has learned."""
    first, last = [0.0, 0.5, 0.5, 1.0], [1.0, 0.5, 0.5, 1.0]
    iteration = {"reward_mean": 0.5, "reward_std": 0.1, "reward_correct": 0.4, "lr": 1e-4, "entropy_mean": 0.6}
    record = RunRecord(
        name="a run",
        iteration=2,
        planned=2,
        state="finished",
        evaluations=[evaluation(0, first), evaluation(2, last)],
        iterations=[{"iteration": 0, **iteration}, {"iteration": 1, **iteration, "entropy_mean": None}],
        standing=Standing(first, last, 4, 2, 0.75),
    )
    return replace(record, **changes)


def study_record(count: int = 3, **changes: Any) -> StudyRecord:
    """Return a study of trials with ten evaluations each, a third of them pruned."""
    made = [
        TrialRecord(
            number=number,
            pruned=number % 3 == 2,
            score=0.5 + number % 7 / 20,
            settings={"train.lr": 10 ** (-5 + number % 11 / 5), "train.aggregation": ("grpo", "dapo")[number % 2]},
            curve=[(10 * step, 0.4 + step * (0.1 + number % 7 / 20) / 10) for step in range(1, 11)],
            tokens=1000.0 * number,
            seconds=1.5 * number,
        )
        for number in range(count)
    ]
    columns = ["trial", "state", "score", "train.lr", "train.aggregation", "run_id"]
    rows = [[str(each.number), "COMPLETE", f"{each.score}", "1e-05", "grpo", f"{each.number:032x}"] for each in made]
    record = StudyRecord(
        name="a study",
        k=1,
        lines=[("trials", f"{count} trials")],
        cautions="",
        trials=made,
        settings=[Setting("train.aggregation", "words"), Setting("train.lr", "log")],
        table=(columns, rows),
        importances={"train.lr": 0.9, "train.aggregation": 0.1},
    )
    return replace(record, **changes)
