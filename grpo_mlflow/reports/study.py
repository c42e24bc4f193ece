"""The report of a study: its outcome in words first, then the trials, what was varied, and how to repeat the best."""

from __future__ import annotations

from grpo_mlflow.reports import study_charts
from grpo_mlflow.reports.page import Page
from grpo_mlflow.reports.records import StudyRecord, TrialRecord, Value


def page(record: StudyRecord) -> str:
    """Return the page of a study as HTML."""
    made = Page(f"Study {record.name}", names=[_name(trial) for trial in record.trials])
    if record.facts:
        made.facts(record.facts)
    _outcome(made, record)
    if record.trials:
        made.charts(study_charts.overview(record.trials, record.confirmed, record.winner, record.k))
    if settings := study_charts.of_settings(record.trials, record.settings, record.k):
        made.heading("Score against each setting", "Point at a trial for its settings.")
        made.charts(settings, small=True)
    if record.importances:
        made.heading(
            "What decides",
            "How much a setting decides about a good score (PED-ANOVA). With few trials it is a hint at most.",
        )
        made.bars(record.importances)
    if costs := study_charts.costs(record.trials, record.k):
        made.heading("Cost", "Score against what the trial cost. The line joins those that nothing cheaper beats.")
        made.charts(costs)
    if record.commands:
        made.heading("What next", "One click selects a whole command.")
        made.commands(record.commands)
    made.heading("Trials", "A click on a column sorts by it.")
    best = None if record.winner is None else str(record.winner)
    made.table(*record.table, sortable=True, best=best)
    return made.render()


def _outcome(made: Page, record: StudyRecord) -> None:
    verdicts = [text for word, text in record.lines if word == "verdict"]
    rest = [line for line in record.lines if line[0] != "verdict"]
    if verdicts:
        made.verdict([f"Winner, trial {record.winner}: {text}" for text in verdicts], record.kind)
    else:
        made.verdict(["No winner yet: no trial was measured again."])
    cards = []
    for name, number in (("winner", record.winner), ("your own settings", record.own)):
        found = next((each for each in record.confirmed if each.number == number), None)
        if found is not None and (name == "winner" or number != record.winner):
            score = found.score
            more = f"[{score.low:.3f}, {score.high:.3f}] on {found.where}"
            cards.append((f"{name}, trial {number}: pass@{record.k}", f"{score.value:.3f}", more))
    if cards:
        made.cards(cards)
    made.pairs(rest)
    made.paragraph(record.cautions)


def _name(trial: TrialRecord) -> str:
    values = "\n".join(f"{key} = {_short(value)}" for key, value in trial.settings.items())
    return f"trial {trial.number}{', pruned' if trial.pruned else ''}\n{values}"


def _short(value: Value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
