"""Search settings: `mlflow run . -e optimize`, or `grpo optimize --n_trials 20`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from grpo_mlflow.cli.command import importing, require_all, require_loss, show, with_task
from grpo_mlflow.config import Resolved, parse_arguments, resolve

if TYPE_CHECKING:
    from grpo_mlflow.search.space import Space

OPTIONS = {
    "space": "what varies: a shipped space, a YAML file, or KEY=[VALUES] ...",
    "n_trials": "trials of the whole study",
    "timeout": "seconds after which no further trial starts",
    "sampler": "tpe, random, grid, gp, cmaes or nsga2",
    "pruner": "paired, median, asha, hyperband, percentile, patient, threshold or none",
    "n_jobs": "trials at once",
    "study_name": "running it again continues the study",
    "storage": "sqlite:///FILE, postgresql://..., or journal:FILE",
}


def checked(argv: Sequence[str]) -> tuple[Resolved, Space] | None:
    """Return what is to be searched, and the space; None where only the settings were to be shown.

    Raises:
        UserError: a setting is wrong, or the space is.
    """
    options = {name: ("", text) for name, text in OPTIONS.items()}
    arguments = parse_arguments(
        argv, "grpo optimize", "Search settings with Optuna; each trial is an MLflow run.", options
    )
    given = [f"search.{name}={value}" for name, value in arguments.options.items() if value]
    resolved = resolve(arguments.config, [*arguments.overrides, *given])
    if arguments.print_config:
        show(resolved)
        return None
    checks = (Resolved.require_trainable, Resolved.require_searchable, with_task, require_loss)
    resolved = require_all(resolved, *checks)
    with importing():
        from grpo_mlflow.search import settings, space_file

    study = settings.pinned(resolved)  # what trials are made from
    found = space_file.load(resolved.config.search.space, study)
    if resolved.config.search.sampler == "grid":
        found.require_grid(study)
    return resolved, found


def main(argv: Sequence[str]) -> None:
    if (given := checked(argv)) is None:
        return
    resolved, found = given
    with importing():
        from grpo_mlflow.search.storage import open_storage

    storage = open_storage(resolved.config.search.storage, resolved.config.tracking.uri)
    with importing():
        from grpo_mlflow.search.optimize import optimize

    optimize(resolved, found, storage, argv)
