"""Studies of small runs."""

from __future__ import annotations

from pathlib import Path

import optuna

from grpo_mlflow.config import Resolved, resolve
from grpo_mlflow.search import space_file
from grpo_mlflow.search.confirm import Finalist
from grpo_mlflow.search.optimize import optimize
from grpo_mlflow.search.storage import open_storage
from tests.support.small_runs import SMALL

STUDY = ("search.pruner=none", "search.finalists=2", "search.confirm_num_ids=8", "search.confirm_replicates=4")


def study_config(store: str, tmp_path: Path, *overrides: str) -> Resolved:
    storage = f"search.storage=sqlite:///{tmp_path}/optuna.db"
    return resolve("tiny", [*SMALL, *STUDY, f"tracking.uri={store}", storage, *overrides])


def search(resolved: Resolved) -> list[Finalist]:
    found = space_file.load(resolved.config.search.space, resolved)
    return optimize(resolved, found, open_storage(resolved.config.search.storage))


def load(resolved: Resolved) -> optuna.Study:
    storage = open_storage(resolved.config.search.storage)
    return optuna.load_study(study_name=resolved.config.search.study_name, storage=storage)
