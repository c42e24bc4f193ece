"""The page of a study, as it ends and whenever it is asked for again."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import optuna
from optuna.storages import BaseStorage

from grpo_mlflow import redaction, tracking
from grpo_mlflow.config import Config
from grpo_mlflow.errors import UserError
from grpo_mlflow.runs.report import mlflow_command
from grpo_mlflow.runtime.files import write_whole
from grpo_mlflow.search import champion, outcome, records, report, rights
from grpo_mlflow.search import study as studies
from grpo_mlflow.search.outcome import Outcome

NAME = "study/report.html"
PARENT = "parent_run_id"  # user attribute of a study: its run in MLflow


def page(study: optuna.Study, found: Outcome, config: Config, folder: Path, url: str | None) -> str:
    """Return the page of a study; `folder` has the files of its run, `url` is the address of the MLflow store."""
    kept = records.kept(study)
    k = json.loads(kept.get("config", {}).get("search.k", "1"))
    return report.page(
        *(study, k, studies.begun_trials(study), found.total, found.finalists, found.own),
        facts={"run": study.user_attrs[PARENT]} if PARENT in study.user_attrs else {},
        commands=_commands(study, found, config, folder) | mlflow_command(url),
    )


def _commands(study: optuna.Study, found: Outcome, config: Config, folder: Path) -> dict[str, str]:
    """Return what can be done with a study next, as commands."""
    given = {"tracking.uri": config.tracking.uri, "search.storage": config.search.storage}
    words = {key: shlex.quote(f"{key}={redaction.redact(value)}") for key, value in given.items() if value}
    store = f" {words['tracking.uri']}" if "tracking.uri" in words else ""
    both, name = "".join(f" {word}" for word in words.values()), study.study_name
    best, settings = (shlex.quote(str(folder / part)) for part in ("study/best_config.yaml", "config/resolved.yaml"))
    commands = {}
    if found.finalists:
        model = shlex.quote(champion.address(name))
        commands = {
            "Train the winner's settings again, with another seed": f"grpo train --config {best} seed=1{store}",
            "Measure the winner on other problems": f"grpo evaluate --model {model} eval.id_seed_start=60000{store}",
        }
    further = f"grpo optimize --config {settings} search.n_trials={2 * found.total}{both}"
    again = f"grpo report --study_name {shlex.quote(name)}{both}"
    return {**commands, "Go on with more trials": further, "Write this page again": again}


def load(name: str, storage: BaseStorage) -> optuna.Study:
    """Return the study of this name.

    Raises:
        UserError: the storage has none.
    """
    known = [each for each in optuna.get_all_study_names(storage) if not rights.is_companion(each)]
    if name not in known:
        listed = ", ".join(sorted(known)[:10]) or "none"
        raise UserError(f"study_name = {name!r}: is not in the storage; allowed: one that it has ({listed})")
    return optuna.load_study(study_name=name, storage=storage)


def write_again(study: optuna.Study, config: Config, output: str) -> Path:
    """Write the page of a study as it stands, by default where it was; return its path.

    Raises:
        UserError: its run is not in the MLflow store, and no `output` is given.
        StoreAway: the store cannot be reached.
    """
    trials = studies.begun_trials(study)
    found = outcome.kept(study) or Outcome(len(trials))
    parent, uri = study.user_attrs.get(PARENT), config.tracking.uri
    if parent is None:
        raise UserError(f"study {study.study_name!r}: has no run in MLflow yet; allowed: a study whose trials began")
    client = tracking.connect(uri)
    folder = tracking.run_folder(tracking.find_run(client, parent))
    path = Path(output).expanduser() if output else folder / NAME
    write_whole(path, page(study, found, config, folder, tracking.address()))
    if not output:
        tracking.send_file(uri, parent, NAME)
    return path
