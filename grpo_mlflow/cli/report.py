"""Write the report of a run or of a study again: `grpo report --run RUN_ID`, `grpo report --study_name NAME`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from grpo_mlflow.cli.command import importing, show
from grpo_mlflow.config import Config, parse_arguments, resolve
from grpo_mlflow.config.command import run_id_of
from grpo_mlflow.errors import ConfigError

OPTIONS = {
    "run": ("", "run id, or the folder of a run's files"),
    "study_name": ("", "instead of a run: a study"),
    "storage": ("", "of the study, if not optuna.db beside the MLflow store"),
    "output": ("", "file to write; empty: where the report was"),
}


def main(argv: Sequence[str]) -> None:
    arguments = parse_arguments(argv, "report", "Write the report of a run or a study again.", OPTIONS)
    name, study, storage, output = (arguments.options[option] for option in OPTIONS)
    given = [f"search.storage={storage}"] if storage else []
    resolved = resolve(arguments.config, [*arguments.overrides, *given])
    if arguments.print_config:
        show(resolved)
        return
    if bool(name) == bool(study):
        raise ConfigError("report: expected --run RUN_ID (or a folder) or --study_name NAME, one of them")
    if output and os.path.isdir(os.path.expanduser(output)):
        raise ConfigError(f"output = {output!r}: is a folder; allowed: the file to write")
    run_id = run_id_of(name)
    if name and run_id is None and not os.path.isdir(os.path.expanduser(name)):
        raise ConfigError(f"run = {name!r}: neither a run id (32 hex digits) nor a folder")
    print(_of_study(study, resolved.config, output) if study else _of_run(name, run_id, resolved.config, output))


def _of_run(name: str, run_id: str | None, config: Config, output: str) -> Path:
    with importing():
        from grpo_mlflow import tracking
        from grpo_mlflow.runs import rewriting

    if run_id is None:
        return rewriting.write(rewriting.in_folder(Path(name).expanduser()), output)
    found = tracking.find_run(tracking.connect(config.tracking.uri), run_id)
    if found.data.tags.get("grpo.kind") == "optimize":
        return _of_study(found.data.params["search.study_name"], config, output)
    return rewriting.write(rewriting.in_store(run_id, config.tracking.uri), output, config.tracking.uri)


def _of_study(name: str, config: Config, output: str) -> Path:
    with importing():
        from grpo_mlflow.search import study_page
        from grpo_mlflow.search.storage import open_existing

    storage = open_existing(config.search.storage, config.tracking.uri)
    return study_page.write_again(study_page.load(name, storage), config, output)
