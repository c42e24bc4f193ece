"""The winner of a study as the champion of a registered model that is named like the study."""

from __future__ import annotations

import re

from grpo_mlflow import tracking
from grpo_mlflow.algorithm.statistics import rate_interval
from grpo_mlflow.config import resolve
from grpo_mlflow.errors import UserError
from grpo_mlflow.runs import published
from grpo_mlflow.runs.stored import find
from grpo_mlflow.runtime.console import Console
from grpo_mlflow.search.confirm import Finalist
from grpo_mlflow.tracking import Tracker
from grpo_mlflow.tracking.registry import WEIGHTS_TAG
from grpo_mlflow.training.checkpoint import name_of

ALIAS = tracking.CHAMPION


def model_name(study_name: str) -> str:
    """Return the name of a study as the registry and its addresses take it: what else they would refuse is a dash."""
    name = re.sub(r"[^\w .+-]", "-", study_name).strip()
    return name if name.strip(". ") else f"study-{name}".rstrip(". ")


def address(study_name: str) -> str:
    return f"models:/{model_name(study_name)}@{ALIAS}"


def register(uri: str | None, study_name: str, winner: Finalist, objective: str, tracker: Tracker) -> str:
    """Make the winner's checkpoint the champion; return its run.

    Of models that were trained again with other seeds it is the one nearest to their mean, with its own score.
    """
    model, name = winner.typical, model_name(study_name)
    stored = find(model.run_id, uri, "best" if objective == "best" else "last")
    if stored.checkpoint is None:
        raise UserError(f"run {model.run_id}: its checkpoint is gone from MLflow, so it cannot become the champion")
    own = f"{rate_interval(model.rates, winner.replicates // len(winner.models))}"
    about = f"{own} on {winner.where}; trial {winner.trial.number} of study {study_name}"
    if winner.retrained:
        low, high = min(winner.retrained), max(winner.retrained)
        count = len(winner.retrained)
        about += f"; trained again with {count} seeds: {low:.3f} to {high:.3f}, mean {winner.confirmed.value:.3f}"
    tags = {"confirmed_score": own, "trial": str(winner.trial.number), "description": about}
    checkpoint, client = f"checkpoints/{name_of(stored.checkpoint.iteration)}", tracking.connect(uri)
    if not tracking.has_artifact(client, model.run_id, f"{checkpoint}/manifest.json"):
        where = tracking.place(tracking.find_run(client, model.run_id).data.tags)
        raise UserError(
            f"run {model.run_id}: MLflow lacks its {checkpoint}, so it cannot become the champion; allowed: the "
            f"command upload for {where}, then this one again"
        )
    folder = tracking.run_folder(tracking.find_run(client, model.run_id))
    own_config = resolve("", base=stored.config, origin="run").config
    kept = published.kept(own_config, model.run_id, folder, {objective: stored.checkpoint}, about)
    tracker.models(model.run_id, kept)
    tags |= {tracking.STUDY_TAG: tracker.run_id, WEIGHTS_TAG: kept[0].weights}
    tracker.register(name, ALIAS, model.run_id, checkpoint, tags)
    return model.run_id


def tell_of_another(uri: str | None, study_name: str, parent: str, console: Console) -> None:
    """Say so if the champion of that name is still that of another study: it keeps an alias of its own."""
    other = tracking.study_of_alias(tracking.connect(uri), model_name(study_name), ALIAS)
    if other not in (None, parent):
        kept = tracking.alias_of(ALIAS, str(other))
        console.warn(
            f"{address(study_name)} was the champion of another study of that name (run {other}); that one is now "
            f"models:/{model_name(study_name)}@{kept}"
        )
