"""What people get of a study: a table, figures in one self-contained HTML page, a summary in plain words."""

from __future__ import annotations

import base64
import csv
import html
import io
from collections.abc import Sequence

import matplotlib
import optuna
from matplotlib.figure import Figure
from optuna.importance import get_param_importances
from optuna.trial import FrozenTrial, TrialState

from grpo_mlflow.search.study import Finalist

matplotlib.use("Agg")
_COLOURS = {TrialState.COMPLETE: "tab:blue", TrialState.PRUNED: "tab:orange", TrialState.FAIL: "tab:red"}


def trials_table(trials: Sequence[FrozenTrial]) -> str:
    """Return one CSV line per trial: number, state, score, last step, seconds, MLflow run, settings."""
    keys = sorted({key for trial in trials for key in trial.params})
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["trial", "state", "score", "last_step", "seconds", "run_id", "duplicate_of", *keys])
    for trial in trials:
        table.writerow(
            [
                trial.number,
                trial.state.name,
                "" if trial.value is None else trial.value,
                max(trial.intermediate_values, default=""),
                f"{trial.duration.total_seconds():.1f}" if trial.duration else "",
                trial.user_attrs.get("run_id", ""),
                trial.user_attrs.get("duplicate_of", ""),
                *(trial.params.get(key, "") for key in keys),
            ]
        )
    return out.getvalue()


def summary(k: int, trials: Sequence[FrozenTrial], finalists: Sequence[Finalist]) -> str:
    """Return the outcome in plain words."""
    counts = {state: sum(trial.state == state for trial in trials) for state in _COLOURS}
    lines = [
        f"{len(trials)} trials: {counts[TrialState.COMPLETE]} finished, {counts[TrialState.PRUNED]} pruned, "
        f"{counts[TrialState.FAIL]} failed or interrupted"
    ]
    for place, finalist in enumerate(finalists):
        name = "winner  " if place == 0 else "finalist"
        lines.append(
            f"{name}  trial {finalist.trial.number}: pass@{k} {finalist.selected} in the search, "
            f"{finalist.confirmed.pass_at(k)} on fresh problems"
        )
    if finalists:
        settings = ", ".join(f"{key} = {value}" for key, value in finalists[0].trial.params.items())
        lines.append(f"settings  {settings}")
    return "\n".join(lines)


def page(study: optuna.Study, k: int, trials: Sequence[FrozenTrial], finalists: Sequence[Finalist]) -> str:
    """Return one HTML page with the summary, the figures (as embedded PNG) and the table."""
    figures = [_history(trials, finalists, k), _curves(trials, k), _settings(trials, k)]
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if len(complete) >= 4 and len({trial.value for trial in complete}) > 1:
        figures.append(_importances(study))
    images = "\n".join(f'<img alt="figure" src="data:image/png;base64,{_png(figure)}">' for figure in figures)
    rows = list(csv.reader(io.StringIO(trials_table(trials))))
    body = "".join(
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
        for row, tag in zip(rows, ["th"] + ["td"] * len(rows), strict=False)
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(study.study_name)}</title>'
        "<style>body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}"
        "img{max-width:100%}table{border-collapse:collapse;font-size:12px}td,th{border:1px solid #ccc;padding:2px 6px}"
        "pre{white-space:pre-wrap;background:#f6f6f6;padding:1em}</style>"
        f"<h1>Study {html.escape(study.study_name)}</h1><pre>{html.escape(summary(k, trials, finalists))}</pre>"
        "<p>The score in the search is that of the best of many noisy measurements, so it is a little too good; "
        "the score on fresh problems is not.</p>"
        f"{images}<h2>Trials</h2><div style='overflow-x:auto'><table>{body}</table></div></html>\n"
    )


def _png(figure: Figure) -> str:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, bbox_inches="tight")
    return base64.b64encode(out.getvalue()).decode()


def _history(trials: Sequence[FrozenTrial], finalists: Sequence[Finalist], k: int) -> Figure:
    figure = Figure(figsize=(9, 4))
    axes = figure.subplots()
    for state in (TrialState.COMPLETE, TrialState.PRUNED):
        shown = [t for t in trials if t.state == state and (t.value is not None or t.intermediate_values)]
        scores = [t.value if t.value is not None else list(t.intermediate_values.values())[-1] for t in shown]
        axes.scatter([t.number for t in shown], scores, color=_COLOURS[state], label=state.name.lower())
    for finalist in finalists:
        found = finalist.confirmed.pass_at(k)
        bars = [[found.value - found.low], [found.high - found.value]]
        axes.errorbar([finalist.trial.number], [found.value], yerr=bars, fmt="D", color="black", capsize=4)
    axes.set(title="Trials in order; black: on fresh problems, 95% interval", xlabel="trial", ylabel=f"pass@{k}")
    axes.legend()
    return figure


def _curves(trials: Sequence[FrozenTrial], k: int) -> Figure:
    figure = Figure(figsize=(9, 4))
    axes = figure.subplots()
    for trial in trials:
        steps = sorted(trial.intermediate_values)
        if steps:
            pruned = trial.state == TrialState.PRUNED
            values = [trial.intermediate_values[step] for step in steps]
            axes.plot(steps, values, color=_COLOURS.get(trial.state, "grey"), alpha=0.6, ls=":" if pruned else "-")
            axes.plot(steps[-1], values[-1], "x" if pruned else "o", color=_COLOURS.get(trial.state, "grey"))
    axes.set(title="Learning curves; dotted with a cross: pruned", xlabel="iteration", ylabel=f"pass@{k}")
    return figure


def _settings(trials: Sequence[FrozenTrial], k: int) -> Figure:
    """Score against each setting, one panel per setting."""
    keys = sorted({key for trial in trials for key in trial.params})
    figure = Figure(figsize=(3 * max(1, len(keys)), 3.4))
    panels = figure.subplots(1, max(1, len(keys)), sharey=True, squeeze=False)[0]
    for axes, key in zip(panels, keys, strict=False):
        for state in (TrialState.COMPLETE, TrialState.PRUNED):
            shown = [t for t in trials if t.state == state and key in t.params and t.intermediate_values]
            scores = [t.intermediate_values[max(t.intermediate_values)] for t in shown]
            values = [t.params[key] for t in shown]
            numeric = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
            axes.scatter(values if numeric else [str(v) for v in values], scores, color=_COLOURS[state], s=18)
        logarithmic = any(getattr(t.distributions.get(key), "log", False) for t in trials)
        axes.set(xlabel=key, xscale="log" if logarithmic else axes.get_xscale())
    panels[0].set_ylabel(f"last pass@{k}")
    return figure


def _importances(study: optuna.Study) -> Figure:
    found = get_param_importances(study)
    figure = Figure(figsize=(9, 0.5 * len(found) + 1.2))
    axes = figure.subplots()
    axes.barh(list(found)[::-1], list(found.values())[::-1])
    axes.set(title="Share of the score's variance that a setting explains (few trials: take it as a hint)")
    return figure
