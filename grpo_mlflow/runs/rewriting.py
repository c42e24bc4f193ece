"""The report of a run written again, from what the run has left: of an old one too, that lacks some of it."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from grpo_mlflow import tracking
from grpo_mlflow.config import Config, resolve
from grpo_mlflow.errors import StoreAway, UserError, one_line
from grpo_mlflow.runs import report
from grpo_mlflow.runs.description import SETTINGS
from grpo_mlflow.runs.next_steps import Place
from grpo_mlflow.runs.stored import config_in
from grpo_mlflow.runtime.files import write_whole
from grpo_mlflow.training.checkpoint import is_name, iteration_of
from grpo_mlflow.training.progress import Progress

_PARTS = ("metrics", "samples", "config")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Left:
    """What a run has left: folders with parts of its files, the state of its newest checkpoint, which run it is."""

    folders: tuple[Path, ...]
    state: Path | None
    place: Place


def in_folder(folder: Path) -> Left:
    """Return what lies in the folder of a run's files.

    Raises:
        UserError: it is no such folder.
    """
    if (folder / "artifacts" / "metrics").is_dir():  # MLflow's folder of the run, which has its files one below
        folder = folder / "artifacts"
    if not (folder / "metrics").is_dir():
        raise UserError(f"run = {str(folder)!r}: no folder of a run's files; allowed: one with metrics/, or a run id")
    names = [path.name for path in (folder / "checkpoints").glob("*") if is_name(path.name)]
    state = folder / "checkpoints" / max(names, key=iteration_of) / "trainer" / "state.json" if names else None
    run_id = folder.parent.name if folder.name == "artifacts" else folder.name
    return Left((folder,), state, Place(run_id, folder.absolute(), None))


def in_store(run_id: str, uri: str | None) -> Left:
    """Return what the MLflow store, or this machine, has of a training run.

    Raises:
        UserError: there is no such run, it did no training, or it has left nothing.
        StoreAway: the store cannot be reached.
    """
    client = tracking.connect(uri)
    found = tracking.find_run(client, run_id)
    kind = found.data.tags.get("grpo.kind", "train")
    if kind != "train":
        raise UserError(f"run = {run_id!r}: is a run of {kind}; allowed: one of train or optimize")
    folder = tracking.run_folder(found)
    folders = [folder]
    for name in _PARTS:
        try:
            folders.append(tracking.artifact(client, run_id, name).parent)
        except StoreAway:
            raise
        except UserError:  # it has none, or this machine alone has it
            continue
    if not any((each / "metrics").is_dir() for each in folders):
        raise UserError(f"run = {run_id!r}: has no metrics; allowed: a run that has begun to train")
    names = list(filter(is_name, tracking.folders(client, run_id, "checkpoints")))
    name = f"checkpoints/{max(names, key=iteration_of)}/trainer/state.json" if names else ""
    state = tracking.artifact(client, run_id, name) if name else None
    return Left(tuple(dict.fromkeys(folders)), state, Place(run_id, folder, tracking.address()))


def write(left: Left, output: str, uri: str | None = None) -> Path:
    """Write the page of a run, by default where it was; return its path."""
    place, files = left.place, report.Files(*left.folders)
    config = _config(left)
    progress = _progress(left, files, config)
    state = "finished" if config is None or progress.iteration >= config.train.iterations else "ended early"
    known = config or Config()
    if config is None:
        known = known.model_copy(update={"train": known.train.model_copy(update={"iterations": progress.iteration})})
    settings = report.differing(known) if config else []
    page = report.page(files, known, progress, place, state=state, settings=settings)
    path = Path(output).expanduser() if output else place.folder / report.NAME
    write_whole(path, page)
    if not output and place.url is not None:
        tracking.send_file(uri, place.run_id, report.NAME)
    return path


def _config(left: Left) -> Config | None:
    """Return the config of the run; None if it is not there, or not one that this version can read."""
    path = next((each / SETTINGS for each in left.folders if (each / SETTINGS).is_file()), None)
    if path is None:
        return None
    try:
        return resolve("", base={**config_in(path), "resume": None}, origin="run").config
    except (UserError, ValueError, AttributeError, TypeError) as error:
        log.warning("the page lacks the settings, which cannot be read: %s", one_line(error))
        return None


def _progress(left: Left, files: report.Files, config: Config | None) -> Progress:
    """Return where the run stands: as its newest checkpoint says, or as far as it has left figures."""
    saved = Progress()
    if left.state is not None:
        try:
            saved = Progress.from_json(json.loads(left.state.read_text())["progress"])
        except (OSError, ValueError, LookupError, TypeError):  # of an earlier version
            saved = Progress()
    if config is not None and saved.iteration >= config.train.iterations:
        return saved  # what there is of later iterations belongs to a branch that was given up
    iteration = max(saved.iteration, files.last("train") + 1, files.last("eval"))
    return Progress(
        iteration=iteration,
        first_rates=saved.first_rates,
        last_rates=saved.last_rates,
        best_score=saved.best_score,
        best_iteration=saved.best_iteration,
        watch=saved.watch,
    )
