"""What the MLflow UI shows as the description of a study's run (`runs.notes`)."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import optuna

from grpo_mlflow.config import Config
from grpo_mlflow.program import program
from grpo_mlflow.runs import messages, naming, notes
from grpo_mlflow.search import champion
from grpo_mlflow.search import study as studies
from grpo_mlflow.search.confirm import Finalist
from grpo_mlflow.tracking import Tracker, pages
from grpo_mlflow.tracking.views import View


def under_way(config: Config, tracker: Tracker, view: View, varied: Sequence[str]) -> dict[str, str]:
    """Describe a study that has begun, or goes on."""
    search = config.search
    first = f"**Under way**: {search.sampler} proposes {', '.join(varied)}, {search.pruner} prunes."
    stop = "set the tag `grpo.command` of this run to `stop`; `prune` at a trial ends that one"
    return notes.of(first, {"trials": _charts(tracker, view), "stop": stop})


def ended(
    study: optuna.Study, config: Config, tracker: Tracker, view: View, summary: str, finalists: Sequence[Finalist]
) -> dict[str, str]:
    """Describe a study that has ended by its summary: counts, finalists, settings, verdict."""
    lines = [line.split(maxsplit=1) for line in summary.splitlines()]
    told = {head: text for head, text in lines if head in ("settings", "verdict", "yours")}
    counts = summary.splitlines()[0]
    if not finalists:
        return notes.of(f"**No winner**: {counts}.", {"trials": _charts(tracker, view)})
    winner = finalists[0]
    k = config.search.k
    first = (
        f"**Trial {winner.trial.number} wins: {naming.settings(winner.trial.params) or 'your own settings'}**, "
        f"pass@{k} {winner.confirmed} on {winner.where}; {told['verdict']}."
    )
    best, store = shlex.quote(str(tracker.run_dir / "study" / "best_config.yaml")), messages.store(config, tracker)
    address = champion.address(study.study_name)
    further = {
        "winner": notes.run_link(f"trial {winner.trial.number}", tracker, winner.trial.user_attrs[studies.RUN_ID]),
        "settings": told["settings"],
        "your own settings": told.get("yours", ""),
        "trials": f"{counts}: {_charts(tracker, view)}, and study/report.html under Artifacts",
        "train with its settings": notes.code(f"{program()} train --config {best}"),
        "measure its model": notes.code(f"{program()} evaluate --model {shlex.quote(address)}{store}"),
    }
    return notes.of(first, further)


def _charts(tracker: Tracker, view: View) -> str:
    return f"[table and charts]({pages.of_view(tracker.experiment_id, view.key)})"
