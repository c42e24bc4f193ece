"""What people get of a study: a table, one self-contained HTML page, a summary in plain words."""

from __future__ import annotations

import base64
import csv
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState

from grpo_mlflow.algorithm.statistics import in_words, paired_difference
from grpo_mlflow.search import figures
from grpo_mlflow.search import study as studies
from grpo_mlflow.search.confirm import Finalist

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
img{max-width:100%}table{border-collapse:collapse;font-size:12px}td,th{border:1px solid #ccc;padding:2px 6px}
pre{white-space:pre-wrap;background:#f6f6f6;padding:1em}figure{margin:2em 0}figcaption{color:#555}
"""


def trials_table(trials: Sequence[FrozenTrial]) -> str:
    """Return one CSV line per trial: number, state, score, cost, MLflow run, settings."""
    keys = sorted({key for trial in trials for key in trial.params})
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    names = ["trial", "state", "score", "last_step", "tokens", "seconds", "run_id", "duplicate_of", "error"]
    table.writerow([*names, *keys])
    for trial in trials:
        attributes, score = trial.user_attrs, figures.shown_score(trial)
        seconds = attributes.get(studies.SECONDS)
        table.writerow(
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
    return out.getvalue()


def _died(attributes: Mapping[str, Any]) -> str:
    return f"its process died {attributes.get(studies.KILLED, 0) + 1} times"


def summary(
    k: int, trials: Sequence[FrozenTrial], total: int, finalists: Sequence[Finalist], own: Finalist | None
) -> str:
    """Return the outcome in plain words; `trials` of `total` were begun."""
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
    lines = [text]
    for place, finalist in enumerate(finalists):
        name = "winner  " if place == 0 else "finalist"
        lines.append(f"{name}  trial {finalist.trial.number}: {_scores(finalist, k)}")
    if not finalists:
        return "\n".join(lines)
    winner = finalists[0]
    if own is not None and own.trial.number != winner.trial.number:
        lines.append(f"yours     trial {own.trial.number}, the settings you started from: {_scores(own, k)}")
    settings = ", ".join(f"{key} = {value}" for key, value in winner.trial.params.items())
    if own is not None and own.trial.number == winner.trial.number:
        settings += " (those you started from: none was better)"
    lines.append(f"settings  {settings}")
    lines.append(_verdict(winner, finalists, own))
    return "\n".join(lines)


def _scores(finalist: Finalist, k: int) -> str:
    text = f"pass@{k} {finalist.selected} in the search, {finalist.confirmed} on {finalist.where}"
    if finalist.retrained:
        each = ", ".join(f"{value:.3f}" for value in finalist.retrained)
        text += f" (mean of models trained again with other seeds: {each})"
    return text


def _verdict(winner: Finalist, finalists: Sequence[Finalist], own: Finalist | None) -> str:
    """Say how sure the winner is, problem by problem on the fresh problems. On others it was chosen for being ahead."""
    parts = []
    for name, other in (("your own settings", own), ("the second", finalists[1] if len(finalists) > 1 else None)):
        if other is None or other.trial.number == winner.trial.number:
            continue
        of, gap = "problems", paired_difference(winner.rates, other.rates)
        if min(len(winner.retrained), len(other.retrained)) > 1:
            of = "problems and training seeds"
            seeds = paired_difference(winner.retrained, other.retrained)  # both were trained with the same seeds
            gap = max(gap, seeds, key=lambda found: found.half_width)
        if winner.fresh:
            parts.append(f"against {name} {in_words(gap, of)}")
        else:
            parts.append(f"against {name} {gap.value:+.3f} on the problems that chose the winner, which is no evidence")
    if own is not None and own.trial.number == winner.trial.number:
        parts.insert(0, "your own settings win")
    return f"verdict   {'; '.join(parts)}" if parts else "verdict   nothing to compare the winner with"


def page(
    study: optuna.Study,
    k: int,
    trials: Sequence[FrozenTrial],
    total: int,
    finalists: Sequence[Finalist],
    own: Finalist | None,
) -> str:
    """Return one HTML page with the summary, the figures (as embedded PNG) and the table."""
    fresh = not finalists or finalists[0].fresh
    second = (
        "the score on fresh problems, which have chosen nothing, is not"
        if fresh
        else "so is the second score: the task has no problems left that have chosen nothing"
    )
    images = "\n".join(
        f'<figure><img alt="{html.escape(text)}" src="data:image/png;base64,{_png(figure)}">'
        f"<figcaption>{html.escape(text)}</figcaption></figure>"
        for text, figure in figures.all_figures(study, trials, finalists, k)
    )
    rows = list(csv.reader(io.StringIO(trials_table(trials))))
    body = "".join(
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
        for row, tag in zip(rows, ["th"] + ["td"] * len(rows), strict=False)
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(study.study_name)}</title>'
        f"<style>{_STYLE}</style><h1>Study {html.escape(study.study_name)}</h1>"
        f"<pre>{html.escape(summary(k, trials, total, finalists, own))}</pre>"
        "<p>The score in the search is that of the best of many noisy measurements, so it is a little too good; "
        f"{second}. Neither contains what another training seed would change, unless finalists were trained again.</p>"
        f"{images}<h2>Trials</h2><div style='overflow-x:auto'><table>{body}</table></div></html>\n"
    )


def _png(figure: Figure) -> str:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, bbox_inches="tight")
    return base64.b64encode(out.getvalue()).decode()
