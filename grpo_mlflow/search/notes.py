"""What the MLflow UI shows as the description of a study's run (`runs.notes`)."""

from __future__ import annotations

import optuna

from grpo_mlflow.config import Config
from grpo_mlflow.runs import naming, notes
from grpo_mlflow.search import champion, report, study_page
from grpo_mlflow.search import study as studies
from grpo_mlflow.search.confirm import Finalist
from grpo_mlflow.search.outcome import Outcome
from grpo_mlflow.tracking import Tracker, pages
from grpo_mlflow.tracking.views import View


def under_way(config: Config, tracker: Tracker, view: View, varied: str) -> str:
    """Describe a study that has begun, or goes on."""
    search = config.search
    first = f"**Under way**: {search.sampler} proposes, {search.pruner} prunes."
    stop = "set the tag `grpo.command` of this run to `stop`; `prune` at a trial ends that one"
    return notes.of(first, {"varied": varied, "trials": _charts(tracker, view), "stop": stop})


def ended(study: optuna.Study, found: Outcome, config: Config, tracker: Tracker, view: View, *, varied: str) -> str:
    """Describe a study that has ended: the winner and how sure it is, then its trials, then commands."""
    k, trials = config.search.k, studies.begun_trials(study)
    facts = dict(report.outcome(k, trials, found.total, found.finalists, found.own))
    further = {"trials": f"{facts['trials']}: {_charts(tracker, view)}, and study/report.html under Artifacts"}
    steps = study_page.commands(study, found, config, tracker.run_dir, tracker.url)
    further |= {what.lower().replace("this page", "the report"): notes.code(each) for what, each in steps.items()}
    if not found.finalists:
        return notes.of("**No winner.**", further)
    winner = found.finalists[0]
    first = (
        f"**Trial {winner.trial.number} wins: {naming.settings(winner.trial.params) or 'your own settings'}**, "
        f"pass@{k} {winner.confirmed} on {winner.where}; {facts['verdict']}."
    )
    model = champion.model_name(study.study_name)
    told = {
        "varied": varied,
        "winner": _link(winner, tracker),
        "mind": "" if winner.retrained else "what another training seed would change is in none of these intervals",
        "settings": facts["settings"],
        "second": _second(found, tracker, k),
        "model": f"[{model}]({pages.of_model(model)}), alias {champion.ALIAS}",
        "your own settings": facts.get("yours", ""),
    }
    return notes.of(first, told | further)


def _second(found: Outcome, tracker: Tracker, k: int) -> str:
    if len(found.finalists) < 2:
        return ""
    second = found.finalists[1]
    what = naming.settings(second.trial.params)
    return f"{_link(second, tracker)}, {what}: pass@{k} {second.confirmed} on {second.where}"


def _link(finalist: Finalist, tracker: Tracker) -> str:
    trial = finalist.trial
    return notes.run_link(f"trial {trial.number}", tracker, trial.user_attrs[studies.RUN_ID])


def _charts(tracker: Tracker, view: View) -> str:
    return f"[table and charts]({pages.of_view(tracker.experiment_id, view.key)})"
