"""The report of a training run, from the files that the run leaves anyway."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_mlflow import redaction
from grpo_mlflow.algorithm.statistics import mean
from grpo_mlflow.config import Config, flatten, model_defaults, yaml12
from grpo_mlflow.program import program
from grpo_mlflow.reports import run
from grpo_mlflow.reports.records import RunRecord, Standing
from grpo_mlflow.runs import next_steps
from grpo_mlflow.runs.description import SETTINGS
from grpo_mlflow.runs.next_steps import Place
from grpo_mlflow.training.checkpoint import name_of
from grpo_mlflow.training.progress import Progress

NAME = "report.html"
_NO_CHOICE = ("resume", "search.", "tracking.")  # settings that do not change what is trained
Differing = tuple[str, str, str]
_SAME = 1e-9  # two means of the same rates, added up in another order


class Files:
    """The figures and samples that a run has written, each file read once.

    Args:
        folders: where to look for each file, in this order.
    """

    def __init__(self, *folders: Path) -> None:
        self._folders = list(folders)
        self._read: dict[str, Any] = {}

    def look_also(self, folder: Path) -> None:
        """Look in a further folder for what is in none of the others."""
        self._folders.append(folder)

    def figures(self, kind: str, iterations: Iterable[int]) -> list[Mapping[str, Any]]:
        """Return the figures of `train` or `eval` at these iterations; those that are not there are left out."""
        found = (self._content(f"metrics/{kind}_{name_of(n)}.json") for n in iterations)
        return [content for content in found if content is not None]

    def tables(self, iterations: Iterable[int]) -> dict[int, Mapping[str, Any]]:
        """Return the tables of completions of the evaluations at these iterations."""
        found = {n: self._content(f"samples/eval_{name_of(n)}.json") for n in iterations}
        return {n: table for n, table in found.items() if table is not None and "data" in table}

    def last(self, kind: str) -> int:
        """Return the last iteration that there are figures of `train` or `eval` of; -1 without any."""
        names = (path.stem for folder in self._folders for path in folder.glob(f"metrics/{kind}_iter_*.json"))
        numbers = (name.removeprefix(f"{kind}_iter_") for name in names)
        return max((int(number) for number in numbers if number.isdigit()), default=-1)

    def _content(self, name: str) -> Any:
        if name not in self._read:
            for folder in self._folders:
                try:
                    self._read[name] = json.loads((folder / name).read_text(), parse_constant=lambda _: None)
                    break
                except (OSError, ValueError):  # not there, or cut off by a full disk
                    continue
        return self._read.get(name)


def page(
    files: Files, config: Config, progress: Progress, place: Place, *, state: str, settings: Sequence[Differing]
) -> str:
    """Return the page of a run that stands at `progress`; `settings` are those of `differing`."""
    evaluations = files.figures("eval", range(progress.iteration + 1))
    record = RunRecord(
        name=config.tracking.run_name or f"Training run: {config.data.task}, {Path(config.model.train_id).name}",
        iteration=progress.iteration,
        planned=config.train.iterations,
        state=state,
        evaluations=evaluations,
        iterations=files.figures("train", range(progress.iteration)),
        tables=files.tables(each["iteration"] for each in evaluations),
        standing=_standing(progress, evaluations, config),
        remarks=list(progress.watch.told.values()),
        facts={"run": place.run_id, "model": config.model.train_id, "task": config.data.task, "seed": str(config.seed)},
        settings=settings,
        grad_clip=config.train.grad_clip,
        commands=commands(config, place),
    )
    return run.page(record)


def _standing(progress: Progress, evaluations: list[Mapping[str, Any]], config: Config) -> Standing | None:
    """Return what the progress knows of the first and the last of these evaluations; None if it knows others."""
    rates = progress.first_rates, progress.last_rates
    if not evaluations or not all(rates) or len(rates[0]) != len(rates[1]) or progress.best_score is None:
        return None
    shown = (evaluations[0], evaluations[-1])
    if any(abs(mean(known) - each["success_rate_all"]) > _SAME for known, each in zip(rates, shown, strict=True)):
        return None
    replicates = int(shown[-1].get("replicates", config.eval.replicates))
    return Standing(*rates, replicates, progress.best_iteration, progress.best_score)


def differing(config: Config) -> list[Differing]:
    """Return the settings that differ from what holds for this model if nothing is set: key, value, that default."""
    defaults = flatten(Config().model_dump(mode="json"))
    layer = model_defaults.start({"model.train_id": config.model.train_id})
    defaults |= {key: value for key, (value, _) in layer.items()}
    values = flatten(redaction.without(config.model_dump(mode="json")))
    return [
        (key, yaml12.inline(value), yaml12.inline(defaults.get(key)))
        for key, value in values.items()
        if not key.startswith(_NO_CHOICE) and value != defaults.get(key)
    ]


def commands(config: Config, place: Place) -> dict[str, str]:
    """Return what can be done with a run next, as commands."""
    longer = next_steps.longer(config, place)
    found = {
        "Measure its best checkpoint on other problems": next_steps.measure_on_others(place.run_id, config, place.url),
        "Go on training, in the same run": longer or "",
        "Train again from its settings, with another seed": next_steps.train_with(
            place.folder / SETTINGS, config, place.url, config.seed + 1
        ),
        "Write this page again": f"{program()} report --run {place.run_id}{next_steps.store(config, place.url)}",
    }
    return {what: command for what, command in found.items() if command} | looking(place.url)


def looking(url: str | None) -> dict[str, str]:
    """Return how the store is looked at: a command for a database, the address of a server."""
    return {} if url is None else {"Compare runs in MLflow": next_steps.looking(url)[0]}
