"""The report of a training run: what it reached first, then how, then with what."""

from __future__ import annotations

from grpo_mlflow.algorithm.statistics import Estimate, in_words, paired_difference, rate_interval, verdict
from grpo_mlflow.reports import run_charts, samples
from grpo_mlflow.reports.page import Page
from grpo_mlflow.reports.records import Figures, RunRecord

_OF_BEST = {
    True: " (picked on these problems, so a little optimistic)",
    False: " (the model before training; no checkpoint is better)",
}


def page(record: RunRecord) -> str:
    """Return the page of a run as HTML."""
    compared = samples.compared(record.tables)
    made = Page(record.name, samples=compared)
    made.facts({"state": f"{record.state}, {record.iteration} of {record.planned} iterations", **record.facts})
    _headline(made, record)
    if evaluated := run_charts.evaluations(record.evaluations):
        made.charts([evaluated])
    if trained := run_charts.training(record.iterations, record.evaluations, record.grad_clip):
        made.heading("Training", "At iteration n: what the model after n iterations sampled, and its update.")
        made.charts(trained)
    if compared:
        made.heading(
            "Answers over time",
            "One sampled completion of the same problem at each evaluation. Problems whose result has changed come "
            "first. Which completion is sampled is partly chance: judge a model by its curve.",
        )
        made.compared_samples()
    if record.settings:
        made.heading("Settings that differ from the default")
        made.table(("setting", "value", "default"), record.settings)
    if record.commands:
        made.heading("What next", "One click selects a whole command.")
        made.commands(record.commands)
    return made.render()


def change_of(record: RunRecord) -> Estimate | None:
    """Return how pass@1 has changed since the first evaluation, paired by problem; None if that is not known."""
    standing = record.standing
    if standing is None or not standing.first:
        return None
    return paired_difference(standing.last, standing.first)


def _headline(made: Page, record: RunRecord) -> None:
    if not record.evaluations:
        made.verdict(["Nothing was evaluated yet.", *_remarks(record)])
        return
    first, last = _scores(record)
    best_at, best = _best(record)
    change, at = change_of(record), record.evaluations[-1]["iteration"]
    if change is None:
        found, kind = f"{_value(last) - _value(first):+.3f}", ""
        words = f"Change {found}. The run has kept no pass@1 of each problem, so how sure that is cannot be said."
    else:
        found, kind = f"{change.value:+.3f}", verdict(change)
        words = f"Change {in_words(change)}."
    problems = f"{record.evaluations[-1].get('tasks', len(record.evaluations)):.0f} problems"
    reached = f"Held-out pass@1 {_shown(first)} → {_shown(last)}"
    made.verdict([reached, f"{words} (95% intervals, {problems})", *_remarks(record)], kind.partition(" ")[0])
    begun = record.evaluations[0]["iteration"]
    before = "before training" if begun == 0 else f"first, iteration {begun}"
    made.cards(
        [
            (before, f"{_value(first):.3f}", _interval(first)),
            ("best", f"{best:.3f}", f"iteration {best_at}{_OF_BEST[best_at > 0]}"),
            (f"last, iteration {at}", f"{_value(last):.3f}", _interval(last)),
            ("change", found, "interval not known" if change is None else _interval(change, "+")),
        ]
    )


def _remarks(record: RunRecord) -> list[str]:
    return [f"Look at: {text}" for text in record.remarks]


def _scores(record: RunRecord) -> tuple[Estimate | float, Estimate | float]:
    """Return pass@1 at the first and at the last evaluation, with intervals if they are known."""
    if (standing := record.standing) is not None and standing.first:
        first, last = (rate_interval(rates, standing.replicates) for rates in (standing.first, standing.last))
        return first, last
    return _score(record.evaluations[0]), _score(record.evaluations[-1])


def _score(figures: Figures) -> Estimate | float:
    if "pass@1" in figures:
        return Estimate(figures["pass@1"], figures["pass@1_low"], figures["pass@1_high"])
    return float(figures["success_rate_all"])  # the same mean, if pass@1 was not asked for


def _best(record: RunRecord) -> tuple[int, float]:
    if (standing := record.standing) is not None and standing.first:
        return standing.best_iteration, standing.best_score
    best = max(record.evaluations, key=lambda each: _value(_score(each)))
    return best["iteration"], _value(_score(best))


def _value(score: Estimate | float) -> float:
    return score.value if isinstance(score, Estimate) else score


def _interval(score: Estimate | float, sign: str = "") -> str:
    return f"[{score.low:{sign}.3f}, {score.high:{sign}.3f}]" if isinstance(score, Estimate) else ""


def _shown(score: Estimate | float) -> str:
    return str(score) if isinstance(score, Estimate) else f"{score:.3f}"
