"""The figures of a study's report."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import optuna
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from optuna.importance import get_param_importances
from optuna.trial import FrozenTrial, TrialState

from grpo_mlflow.algorithm.statistics import mean
from grpo_mlflow.search import study as studies
from grpo_mlflow.search.confirm import Finalist

matplotlib.use("Agg")
_BELOW = -0.1  # where a trial is drawn that does not have a setting
_COLOURS = {TrialState.COMPLETE: "tab:blue", TrialState.PRUNED: "tab:orange"}


def shown_score(trial: FrozenTrial) -> float | None:
    """Return a trial's score; of a pruned one, the one that it had by then."""
    if trial.state == TrialState.COMPLETE:
        return studies.score(trial)
    if studies.SCORE in trial.user_attrs:
        return float(trial.user_attrs[studies.SCORE])
    curve = studies.curve(trial)
    return mean(curve[max(curve)]) if curve else None


def all_figures(
    study: optuna.Study, trials: Sequence[FrozenTrial], finalists: Sequence[Finalist], k: int
) -> list[tuple[str, Figure]]:
    """Return the figures that the trials allow, each with a sentence on how to read it."""
    shown = [trial for trial in trials if trial.state in _COLOURS and shown_score(trial) is not None]
    if not shown:
        return []
    figures = [
        (
            "Every trial in order. Orange ones were pruned and show where they stood. Black: the finalists measured "
            "again, with 95% intervals; the step down from blue to black is the luck of the search.",
            _history(shown, finalists, k),
        ),
        ("Learning curves. Dotted with a cross: pruned.", _curves(shown, k)),
        (
            "Each line is a trial, and its right end its score; the lighter and thicker, the better its rank.",
            _parallel(shown, k),
        ),
        ("Score against each setting.", _settings(shown, k)),
        ("Score against what the trial cost. The line joins those that nothing cheaper beats.", _cost(shown, k)),
    ]
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if len(complete) >= 4 and len({studies.score(trial) for trial in complete}) > 1:
        text = "How much a setting decides about a good score (PED-ANOVA). With few trials it is a hint at most."
        figures.append((text, _importances(study)))
    return figures


def _history(trials: Sequence[FrozenTrial], finalists: Sequence[Finalist], k: int) -> Figure:
    figure = Figure(figsize=(9, 4))
    axes = figure.subplots()
    for state, colour in _COLOURS.items():
        some = [trial for trial in trials if trial.state == state]
        if some:
            axes.scatter(
                [t.number for t in some], [shown_score(t) or 0.0 for t in some], color=colour, label=_word(state)
            )
    for place, finalist in enumerate(finalists):
        found = finalist.confirmed
        bars = [[found.value - found.low], [found.high - found.value]]
        label = f"on {finalist.where.partition(',')[0]}" if place == 0 else None
        axes.errorbar(
            [finalist.trial.number], [found.value], yerr=bars, fmt="D", color="black", capsize=4, ms=4, label=label
        )
    axes.set(xlabel="trial", ylabel=f"pass@{k}")
    axes.legend()
    return figure


def _curves(trials: Sequence[FrozenTrial], k: int) -> Figure:
    figure = Figure(figsize=(9, 4))
    axes = figure.subplots()
    for trial in trials:
        curve = studies.curve(trial)
        if not curve:  # an equal trial shares another's run
            continue
        pruned, colour = trial.state == TrialState.PRUNED, _COLOURS[trial.state]
        values = [mean(rates) for rates in curve.values()]
        axes.plot(list(curve), values, color=colour, alpha=0.6, ls=":" if pruned else "-")
        axes.plot(list(curve)[-1], values[-1], "x" if pruned else "o", color=colour)
        axes.annotate(str(trial.number), (list(curve)[-1], values[-1]), (4, 0), textcoords="offset points", fontsize=7)
    axes.set(xlabel="iteration", ylabel=f"pass@{k}")
    return figure


def _parallel(trials: Sequence[FrozenTrial], k: int) -> Figure:
    keys = _keys(trials)
    figure = Figure(figsize=(max(6.0, 2.2 * (len(keys) + 1)), 4.2))
    axes = figure.subplots()
    scores = [shown_score(trial) or 0.0 for trial in trials]
    low, high = min(scores), max(scores)
    scale = {key: _Scale(trials, key) for key in keys}
    for rank, (trial, score) in enumerate(sorted(zip(trials, scores, strict=True), key=lambda pair: pair[1])):
        place = (score - low) / (high - low) if high > low else 0.5
        better = rank / max(1, len(trials) - 1)  # one outlier must not make all others look alike
        heights = [scale[key].height(trial.params[key]) if key in trial.params else _BELOW for key in keys] + [place]
        pruned = trial.state == TrialState.PRUNED
        axes.plot(heights, color=colormaps["viridis"](better), ls=":" if pruned else "-", lw=1.0 + 1.5 * better)
    for at, key in enumerate(keys):
        axes.axvline(at, color="grey", lw=0.8)
        for height, text in scale[key].ticks():
            axes.annotate(text, (at, height), (3, 0), textcoords="offset points", fontsize=8, va="center")
    axes.axvline(len(keys), color="grey", lw=0.8)
    for height, value in ((0.0, low), (1.0, high)):
        axes.annotate(f"{value:.3f}", (len(keys), height), (3, 0), textcoords="offset points", fontsize=8, va="center")
    axes.set(xticks=range(len(keys) + 1), xticklabels=[*(key.replace(".", ".\n", 1) for key in keys), f"pass@{k}"])
    axes.set(yticks=[], xlim=(-0.1, len(keys) + 0.35), ylim=(-0.12, 1.08))
    for side in axes.spines.values():
        side.set_visible(False)
    return figure


class _Scale:
    """Puts the values of a setting on an axis from 0 to 1; one that a trial does not have, below it."""

    def __init__(self, trials: Sequence[FrozenTrial], key: str) -> None:
        values = [trial.params[key] for trial in trials if key in trial.params]
        self._numeric = _is_numeric(trials, key)
        self._log = _is_log(trials, key)
        found = {float(v) for v in values} if self._numeric else {str(v) for v in values}
        self._known: list[Any] = sorted(found)

    def height(self, value: Any) -> float:
        if not self._numeric:
            return self._known.index(str(value)) / max(1, len(self._known) - 1)
        low, high, at = self._known[0], self._known[-1], float(value)
        if low == high:
            return 0.5
        if self._log:
            low, high, at = np.log(low), np.log(high), np.log(at)
        return float((at - low) / (high - low))

    def ticks(self) -> list[tuple[float, str]]:
        values = self._known if len(self._known) <= 5 else [self._known[0], self._known[-1]]
        return [(self.height(v), f"{v:.3g}" if self._numeric else v) for v in values]


def _settings(trials: Sequence[FrozenTrial], k: int) -> Figure:
    keys = _keys(trials)
    figure = Figure(figsize=(3 * max(1, len(keys)), 3.4))
    panels = figure.subplots(1, max(1, len(keys)), sharey=True, squeeze=False)[0]
    for axes, key in zip(panels, keys, strict=False):
        words = [] if _is_numeric(trials, key) else sorted({str(t.params[key]) for t in trials if key in t.params})
        for state, colour in _COLOURS.items():
            some = [trial for trial in trials if trial.state == state and key in trial.params]
            at = [words.index(str(trial.params[key])) if words else trial.params[key] for trial in some]
            axes.scatter(at, [shown_score(trial) or 0.0 for trial in some], color=colour, s=18)
        if words:
            axes.set_xticks(range(len(words)), words)
        if _is_log(trials, key):
            axes.set_xscale("log")
        axes.set_xlabel(key)
    panels[0].set_ylabel(f"pass@{k}")
    return figure


def _cost(trials: Sequence[FrozenTrial], k: int) -> Figure:
    figure = Figure(figsize=(9, 3.6))
    panels: Sequence[Axes] = figure.subplots(1, 2, sharey=True)
    for axes, name, text in zip(
        panels, (studies.TOKENS, studies.SECONDS), ("tokens sampled in training", "seconds of training"), strict=True
    ):
        points = [(t.user_attrs[name], shown_score(t) or 0.0, t) for t in trials if name in t.user_attrs]
        for state, colour in _COLOURS.items():
            some = [(x, y) for x, y, trial in points if trial.state == state]
            axes.scatter([x for x, _ in some], [y for _, y in some], color=colour, s=18)
        front: list[tuple[float, float]] = []
        for x, y, _ in sorted(points, key=lambda point: (point[0], -point[1])):
            if not front or y > front[-1][1]:
                front.append((x, y))
        axes.step([x for x, _ in front], [y for _, y in front], where="post", color="grey", lw=1)
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel(text)
    panels[0].set_ylabel(f"pass@{k}")
    return figure


def _importances(study: optuna.Study) -> Figure:
    target = (lambda trial: -studies.score(trial)) if len(study.directions) > 1 else None  # it looks for low ones
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # on few trials, which the caption says
        found = get_param_importances(study, target=target)
    figure = Figure(figsize=(9, 0.4 * len(found) + 1.0))
    axes = figure.subplots()
    axes.barh(list(found)[::-1], list(found.values())[::-1])
    return figure


def _keys(trials: Sequence[FrozenTrial]) -> list[str]:
    return sorted({key for trial in trials for key in trial.params})


def _is_numeric(trials: Sequence[FrozenTrial], key: str) -> bool:
    """Return whether all that a setting may be is numbers: not what some trials happen to have of it."""
    for trial in trials:
        if (distribution := trial.distributions.get(key)) is not None:
            values = getattr(distribution, "choices", ())
            return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    return True


def _is_log(trials: Sequence[FrozenTrial], key: str) -> bool:
    return any(getattr(trial.distributions.get(key), "log", False) for trial in trials)


def _word(state: TrialState) -> str:
    return "finished" if state == TrialState.COMPLETE else state.name.lower()
