"""The curves of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from grpo_mlflow.reports import charts
from grpo_mlflow.reports.charts import BLACK, BLUE, COLORS, DASHED, DOTTED, Axis, Chart, Mark
from grpo_mlflow.reports.records import Figures

_STEP = Axis("iteration", whole=True)
_SHARE, _SMALL_SHARE = Axis("share", start=0.0, end=1.0), Axis("share", start=0.0)
_OF_REWARDS = ("_std", "_at_lowest", "_at_highest", "_applies")  # further figures of a part of the reward


def evaluations(figures: Sequence[Figures]) -> Chart | None:
    """Return the chart of the held-out problems: pass@k with its intervals, the likeliest answer, chance."""
    if not figures:
        return None
    last = figures[-1]
    ks = sorted(int(name.removeprefix("pass@")) for name in last if name.startswith("pass@") and name[5:].isdigit())
    x = [each["iteration"] for each in figures]
    marks = []
    for k, color in zip(ks, (BLUE, COLORS[1], COLORS[2], COLORS[3]), strict=False):
        y, low, high = ([each.get(f"pass@{k}{end}") for each in figures] for end in ("", "_low", "_high"))
        marks.append(Mark("line", f"pass@{k}", x, y, color, low, high))
    for name, label, dash in (("greedy_accuracy", "greedy", DASHED), ("chance_pass@1", "chance", DOTTED)):
        y = [each.get(name) for each in figures]
        if any(y) or (label == "greedy" and any(value is not None for value in y)):
            marks.append(Mark("line", label, x, y, BLACK, dash=dash, width=1.5))
    note = "Bands: 95% intervals over problems. The same problems and draws at each evaluation."
    return Chart("Held-out problems", _STEP, Axis("share solved", start=0.0, end=1.0), marks, note, wide=True)


def training(figures: Sequence[Figures], evaluated: Sequence[Figures], grad_clip: float | None = None) -> list[Chart]:
    """Return the charts of the training iterations; one without any value is left out."""
    if not figures:
        return []
    some = [figures[i] for i in charts.thinned(len(figures))]
    rewards = {name: _of_reward(name) for name in figures[-1] if _is_reward(name)}
    solved = {"success_rate": "solved", "flat_group_frac": "flat groups"}
    lengths = {"completion_length_mean": "mean", "completion_length_max": "longest"}
    clipped = {"clip_low_frac": "below", "clip_high_frac": "above", "ratio_clip_frac": "either"}
    cut = _chart("Cut off", _SMALL_SHARE, some, {"truncated_frac": "training"}, "Completions that reached the limit.")
    length = _chart("Length of completions", "tokens", some, lengths)
    found = [
        _chart("Reward", "reward", some, rewards, "The mean over rollouts, and its named parts."),
        _chart("Solved, flat", _SHARE, some, solved, "Right rollouts; groups of equal rewards, which teach nothing."),
        _chart("Entropy", "nats per token", some, {"entropy_mean": "entropy"}, "Near 0 early: it stopped exploring."),
        _chart("KL from the reference", "nats per token", some, _with_values(figures, {"kl_divergence": "KL"})),
        _with_evaluated(length, evaluated, "completion_length_mean"),
        _with_evaluated(cut, evaluated, "truncated_frac"),
        _with_limit(_chart("Gradient", "norm", some, {"grad_norm": "norm before clipping"}), some, grad_clip),
        _chart(
            "Clipped ratios", _SMALL_SHARE, some, _with_values(figures, clipped), "Tokens outside the trusted range."
        ),
        _chart("Learning rate", "learning rate", some, {"lr": "learning rate"}),
    ]
    return [chart for chart in found if chart is not None]


def _is_reward(name: str) -> bool:
    return name.startswith("reward_") and not name.endswith(_OF_REWARDS)


def _of_reward(name: str) -> str:
    return "total" if name == "reward_mean" else name.removeprefix("reward_")


def _with_values(figures: Sequence[Figures], curves: Mapping[str, str]) -> Mapping[str, str]:
    """Return the curves if any of them ever was not 0: without a reference, or with one step, there is nothing."""
    return curves if any(each.get(name) for each in figures for name in curves) else {}


def _chart(
    title: str, axis: Axis | str, figures: Sequence[Figures], curves: Mapping[str, str], note: str = ""
) -> Chart | None:
    """Return a chart of the curves (name in the files: label) that have values, None without any.

    An axis that is given by its label alone is logarithmic if that shows more; otherwise it begins at 0.
    """
    x = [each["iteration"] for each in figures]
    known = {label: [each.get(name) for each in figures] for name, label in curves.items()}
    known = {label: y for label, y in known.items() if any(value is not None for value in y)}
    if not known:
        return None
    marks = [Mark("line", label, x, y, COLORS[i % len(COLORS)]) for i, (label, y) in enumerate(known.items())]
    if isinstance(axis, str):
        log = charts.fits_log([value for y in known.values() for value in y])
        axis = Axis(axis, log=True) if log else Axis(axis, start=0.0)
    return Chart(title, _STEP, axis, marks, note)


def _with_evaluated(chart: Chart | None, evaluated: Sequence[Figures], name: str) -> Chart | None:
    """Return the chart with the same figure of the evaluations."""
    y = [each.get(name) for each in evaluated]
    if chart is None or not any(value is not None for value in y):
        return chart
    mark = Mark("line", "evaluation", [each["iteration"] for each in evaluated], y, BLACK, dash=DASHED, width=1.5)
    return replace(chart, marks=[*chart.marks, mark])


def _with_limit(chart: Chart | None, figures: Sequence[Figures], limit: float | None) -> Chart | None:
    """Return the chart with a line at the largest norm that is let through."""
    if chart is None or limit is None:
        return chart
    x = [each["iteration"] for each in (figures[0], figures[-1])]
    mark = Mark("line", "clipped above", x, [limit] * 2, BLACK, dash=DASHED, width=1.5)
    return replace(chart, marks=[*chart.marks, mark])
