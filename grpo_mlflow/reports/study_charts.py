"""The charts of a study: every one has a point or a line for a trial."""

from __future__ import annotations

from collections.abc import Sequence

from grpo_mlflow.reports.charts import BLACK, BLUE, GREEN, ORANGE, Axis, Chart, Lines, Mark
from grpo_mlflow.reports.records import Confirmed, Setting, TrialRecord, Value

_GREY = "#7a838d"
Trials = Sequence[TrialRecord]


def overview(trials: Trials, confirmed: Sequence[Confirmed], winner: int | None, k: int) -> list[Chart]:
    """Return the trials in order, and their learning curves."""
    marks: list[Mark | Lines] = [*_best_so_far(trials), *_points(trials, [trial.number for trial in trials])]
    for where in dict.fromkeys(each.where for each in confirmed):
        some = [each for each in confirmed if each.where == where]
        ends = [[getattr(each.score, name) for each in some] for name in ("value", "low", "high")]
        numbers = [float(each.number) for each in some]
        color = BLACK if where == confirmed[0].where else _GREY
        marks.append(Mark("points", f"on {where}", numbers, ends[0], color, ends[1], ends[2], shape="diamond"))
    note = (
        "Pruned trials show where they stood. Diamonds: the finalists measured again, with 95% intervals; the step "
        "down to them is the luck of the search."
    )
    axis, score = Axis("trial", whole=True), Axis(f"pass@{k}")
    order = Chart("Trials in order", axis, score, marks, note, wide=True, hover="point")
    drawn = _curves(trials, winner)
    if not drawn:
        return [order]
    note = "Pass@k at each evaluation of a trial. Dashed with a cross: pruned."
    return [order, Chart("Learning curves", Axis("iteration", whole=True), score, drawn, note, True, "point")]


def of_settings(trials: Trials, settings: Sequence[Setting], k: int) -> list[Chart]:
    """Return the score against each setting, of the trials that have it."""
    found = []
    for setting in settings:
        some = [(i, trial) for i, trial in enumerate(trials) if setting.key in trial.settings]
        if not some:
            continue
        if setting.scale == "words":
            values = sorted({trial.settings[setting.key] for _, trial in some}, key=_order)
            places: list[float] = [values.index(trial.settings[setting.key]) for _, trial in some]
            axis = Axis(setting.key, categories=[str(value) for value in values])
        else:
            places = [float(trial.settings[setting.key] or 0.0) for _, trial in some]
            axis = Axis(setting.key, log=setting.scale == "log", whole=setting.whole)
        marks = _points([trial for _, trial in some], places, [i for i, _ in some])
        found.append(Chart("", axis, Axis(f"pass@{k}"), marks, hover="point"))  # the axis has the name
    return found


def _order(value: Value) -> tuple[bool, float, str]:
    """Return what sorts numbers by value, and before all else."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return (not number, float(value) if isinstance(value, (int, float)) else 0.0, str(value))


def costs(trials: Trials, k: int) -> list[Chart]:
    """Return the score against the tokens and the seconds that a trial took."""
    found = []
    for name, label in (("tokens", "tokens sampled in training"), ("seconds", "seconds of training")):
        some = [(i, cost, trial) for i, trial in enumerate(trials) if (cost := getattr(trial, name)) is not None]
        if not some:
            continue
        front: list[tuple[float, float]] = []
        for _, cost, trial in sorted(some, key=lambda each: (each[1], -each[2].score)):
            if not front or trial.score > front[-1][1]:
                front.append((cost, trial.score))
        x, y = [cost for cost, _ in front], [score for _, score in front]
        steps = Mark("steps", "nothing cheaper beats", x, y, _GREY, width=1.5)
        marks = [steps, *_points([t for *_, t in some], [cost for _, cost, _ in some], [i for i, *_ in some])]
        found.append(Chart(name.capitalize(), Axis(label), Axis(f"pass@{k}"), marks, hover="point"))
    return found


def _points(trials: Trials, x: Sequence[float], of: Sequence[int] | None = None) -> list[Mark]:
    """Return the trials as points at these places; `of` are their numbers among the page's names."""
    names = list(range(len(trials)) if of is None else of)
    ended = [i for i, trial in enumerate(trials) if not trial.pruned]
    pruned = [i for i, trial in enumerate(trials) if trial.pruned]

    def of_these(places: Sequence[int]) -> tuple[list[float], list[float]]:
        return [float(x[i]) for i in places], [trials[i].score for i in places]

    marks = []
    if ended:
        marks.append(Mark("points", "finished", *of_these(ended), BLUE, of=[names[i] for i in ended]))
    if pruned:
        marks.append(Mark("points", "pruned", *of_these(pruned), ORANGE, of=[names[i] for i in pruned], shape="cross"))
    return marks


def _best_so_far(trials: Trials) -> list[Mark]:
    """Return the best score of the trials that had finished, in the order of their numbers."""
    x: list[float] = []
    y: list[float] = []
    for trial in sorted(trials, key=lambda each: each.number):
        if not trial.pruned:
            x.append(trial.number)
            y.append(max(trial.score, y[-1] if y else trial.score))
    return [Mark("steps", "best so far", x, y, _GREY, width=1.5)] if x else []


def _curves(trials: Trials, winner: int | None) -> list[Mark | Lines]:
    lines: dict[str, list[tuple[int, Sequence[float], Sequence[float]]]] = {"finished": [], "pruned": [], "winner": []}
    for i, trial in enumerate(trials):
        if trial.curve:
            kind = "winner" if trial.number == winner else "pruned" if trial.pruned else "finished"
            lines[kind].append((i, [step for step, _ in trial.curve], [value for _, value in trial.curve]))
    alpha = 0.65 if len(trials) <= 60 else 0.25
    found = [
        Lines("finished", lines["finished"], BLUE, alpha=alpha),
        Lines("pruned", lines["pruned"], ORANGE, dash=(5.0, 4.0), alpha=min(1.0, alpha + 0.2), shape="cross"),
        Lines(f"winner, trial {winner}", lines["winner"], GREEN, width=3.0),
    ]
    return [each for each in found if each.lines]
