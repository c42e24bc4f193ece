"""The page of a study, as it ends and whenever it is asked for again."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import optuna
from optuna.storages import BaseStorage

from grpo_mlflow import tracking
from grpo_mlflow.config import Config
from grpo_mlflow.errors import UserError
from grpo_mlflow.program import program
from grpo_mlflow.runs import next_steps
from grpo_mlflow.runs.description import SETTINGS
from grpo_mlflow.runs.report import looking
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
        commands=commands(study, found, config, folder, url) | looking(url),
    )


def commands(study: optuna.Study, found: Outcome, config: Config, folder: Path, url: str | None) -> dict[str, str]:
    """Return what can be done with a study next, as commands."""
    name, settings = study.study_name, shlex.quote(str(folder / SETTINGS))
    storage = f" {next_steps.word('search.storage', config.search.storage)}" if config.search.storage else ""
    both = next_steps.store(config, url) + storage
    of_winner = {}
    if found.finalists:
        best, model = folder / "study" / "best_config.yaml", champion.address(name)
        of_winner = {
            "Train the winner's settings again, with another seed": next_steps.train_with(
                best, config, url, config.seed + 1
            ),
            "Measure the winner on other problems": next_steps.measure_on_others(model, config, url),
        }
    return {
        **of_winner,
        "Go on with more trials": f"{program()} optimize --config {settings} search.n_trials={2 * found.total}{both}",
        "Write this page again": f"{program()} report --study_name {shlex.quote(name)}{both}",
    }


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
