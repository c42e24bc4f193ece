"""What people get of a study: a table, one self-contained HTML page, a summary in plain words."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState

from grpo_mlflow.algorithm import statistics
from grpo_mlflow.algorithm.statistics import Estimate, in_words, paired_difference
from grpo_mlflow.reports import study as reports
from grpo_mlflow.reports.records import Confirmed, StudyRecord
from grpo_mlflow.search import study as studies
from grpo_mlflow.search import trial_records
from grpo_mlflow.search.confirm import Finalist

_COLUMNS = ("trial", "state", "score", "last_step", "tokens", "seconds", "run_id", "duplicate_of", "error")


def trials_table(trials: Sequence[FrozenTrial]) -> str:
    """Return one CSV line per trial: number, state, score, cost, MLflow run, settings."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(_table(trials))
    return out.getvalue()


def _table(trials: Sequence[FrozenTrial]) -> list[list[str]]:
    """Return a row of names, and one for each trial."""
    keys = sorted({key for trial in trials for key in trial.params})
    rows: list[list[object]] = [[*_COLUMNS, *keys]]
    for trial in trials:
        attributes, score = trial.user_attrs, trial_records.shown_score(trial)
        seconds = attributes.get(studies.SECONDS)
        rows.append(
            [
                trial.number,
                trial.state.name,
                "" if score is None else score,
                max(studies.curve(trial), default=""),
                attributes.get(studies.TOKENS, ""),
                "" if seconds is None else f"{seconds:.1f}",
                attributes.get(studies.RUN_ID, ""),
                attributes.get(studies.DUPLICATE_OF, ""),
                attributes.get("error", _died(attributes) if trial.state == TrialState.FAIL else ""),
                *(trial.params.get(key, "") for key in keys),
            ]
        )
    return [["" if cell is None else str(cell) for cell in row] for row in rows]


def _died(attributes: Mapping[str, Any]) -> str:
    return f"its process died {attributes.get(studies.KILLED, 0) + 1} times"


def summary(
    k: int, trials: Sequence[FrozenTrial], total: int, finalists: Sequence[Finalist], own: Finalist | None
) -> str:
    """Return the outcome in plain words; `trials` of `total` were begun."""
    (_, begun), *rest = outcome(k, trials, total, finalists, own)
    return "\n".join([begun, *(f"{word:<10}{text}" for word, text in rest)])


def outcome(
    k: int, trials: Sequence[FrozenTrial], total: int, finalists: Sequence[Finalist], own: Finalist | None
) -> list[tuple[str, str]]:
    """Return the outcome as facts, each after a word on what it is; the first is on the trials."""
    counts = {state: sum(trial.state == state for trial in trials) for state in TrialState}
    shared = sum(studies.DUPLICATE_OF in trial.user_attrs for trial in trials)
    text = (
        f"{len(trials)} trials: {counts[TrialState.COMPLETE]} finished, {counts[TrialState.PRUNED]} pruned, "
        f"{counts[TrialState.FAIL]} failed"
    )
    if shared:
        text += f" ({shared} of them share the result of equal settings)"
    if len(trials) < total:
        text += f", {total - len(trials)} not begun (the same command goes on with them)"
    lines = [("trials", text)]
    for place, finalist in enumerate(finalists):
        name = "winner" if place == 0 else "finalist"
        lines.append((name, f"trial {finalist.trial.number}: {_scores(finalist, k)}"))
    if not finalists:
        return lines
    winner = finalists[0]
    if own is not None and own.trial.number != winner.trial.number:
        text = f"trial {own.trial.number}, the settings you started from: {_scores(own, k)}"
        lines.append(("yours", text))
    settings = ", ".join(f"{key} = {value}" for key, value in winner.trial.params.items())
    if own is not None and own.trial.number == winner.trial.number:
        settings += " (those you started from: none was better beyond the noise)"
    return [*lines, ("settings", settings), ("verdict", _verdict(winner, finalists, own))]


def _scores(finalist: Finalist, k: int) -> str:
    text = f"pass@{k} {finalist.selected} in the search, {finalist.confirmed} on {finalist.where}"
    if finalist.retrained:
        each = ", ".join(f"{value:.3f}" for value in finalist.retrained)
        text += f" (mean of models trained again with other seeds: {each})"
    return text


def _difference(winner: Finalist, other: Finalist) -> tuple[Estimate, str]:
    """Return how far the winner is ahead of another, problem by problem, and whose noise that is beyond or within."""
    of, gap = "problems", paired_difference(winner.rates, other.rates)
    if min(len(winner.retrained), len(other.retrained)) > 1:
        of = "problems and training seeds"
        seeds = paired_difference(winner.retrained, other.retrained)  # both were trained with the same seeds
        gap = max(gap, seeds, key=lambda found: found.half_width)
    return gap, of


def _verdict(winner: Finalist, finalists: Sequence[Finalist], own: Finalist | None) -> str:
    """Say how sure the winner is, problem by problem on the fresh problems. On others it was chosen for being ahead."""
    parts = []
    for name, other in (("your own settings", own), ("the second", finalists[1] if len(finalists) > 1 else None)):
        if other is None or other.trial.number == winner.trial.number:
            continue
        gap, of = _difference(winner, other)
        if winner.fresh:
            parts.append(f"against {name} {in_words(gap, of)}")
        else:
            parts.append(f"against {name} {gap.value:+.3f} on the problems that chose the winner, which is no evidence")
    if own is not None and own.trial.number == winner.trial.number:
        parts.insert(0, "your own settings win")
    return "; ".join(parts) if parts else "nothing to compare the winner with"


def page(
    study: optuna.Study,
    k: int,
    trials: Sequence[FrozenTrial],
    total: int,
    finalists: Sequence[Finalist],
    own: Finalist | None,
    *,
    facts: Mapping[str, str] | None = None,
    commands: Mapping[str, str] | None = None,
) -> str:
    """Return one HTML page: the outcome, the trials in charts and in a table; `commands` with what each does."""
    fresh = not finalists or finalists[0].fresh
    second = (
        "the score on fresh problems, which have chosen nothing, is not"
        if fresh
        else "so is the second score: the task has no problems left that have chosen nothing"
    )
    measured = {each.trial.number: each for each in [*finalists, *([own] if own is not None else [])]}
    record = StudyRecord(
        name=study.study_name,
        k=k,
        lines=outcome(k, trials, total, finalists, own),
        cautions="The score in the search is that of the best of many noisy measurements, so it is a little too good; "
        f"{second}. Neither contains what another training seed would change, unless finalists were trained again.",
        trials=trial_records.trials_of(trials),
        settings=trial_records.settings_of(trials),
        table=_shown_table(trials),
        kind=_kind(finalists, own),
        confirmed=[
            Confirmed(number, each.confirmed, each.where.partition(",")[0]) for number, each in measured.items()
        ],
        winner=finalists[0].trial.number if finalists else None,
        own=own.trial.number if own is not None else None,
        importances=trial_records.importances(study, trials),
        facts=facts or {},
        commands=commands or {},
    )
    return reports.page(record)


def _kind(finalists: Sequence[Finalist], own: Finalist | None) -> Literal["better", "worse", ""]:
    if not finalists or own is None or own.trial.number == finalists[0].trial.number or not finalists[0].fresh:
        return ""
    found = statistics.verdict(_difference(finalists[0], own)[0])
    return "" if found == "not distinguishable" else found


def _shown_table(trials: Sequence[FrozenTrial]) -> tuple[list[str], list[list[str]]]:
    """Return the table of trials as people read it: settings beside the score, short numbers, no empty column."""
    columns, *rows = _table(trials)
    settings = range(len(_COLUMNS), len(columns))
    order = [0, 1, 2, *settings, *range(3, len(_COLUMNS))]
    order = [i for i in order if any(row[i] for row in rows)]
    return [columns[i] for i in order], [[_shown(row[i]) for i in order] for row in rows]


def _shown(cell: str) -> str:
    """Return a cell with a number shortened that has more digits than people compare."""
    try:
        return f"{float(cell):.5g}" if len(cell) > 6 and not cell.isalnum() else cell
    except ValueError:
        return cell
