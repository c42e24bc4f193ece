"""What a name stands for: `tiny`, a hub id, a folder, a checkpoint of ours, an MLflow run id or registered model."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_mlflow import tracking
from grpo_mlflow.config import Arguments, Resolved, parse_overrides, resolve, yaml12
from grpo_mlflow.config.command import run_id_of
from grpo_mlflow.errors import StoreAway, UserError
from grpo_mlflow.training.checkpoint import Checkpoint, read

_INSTEAD = {
    "optimize": "the same optimize command again, which continues the study",
    "evaluate": "evaluate, which measures a model again",
}
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Stored:
    """The run behind a name: its config, and the checkpoint asked for (None where it has none yet)."""

    run_id: str | None
    config: dict[str, Any]
    checkpoint: Checkpoint | None


def _path(name: str) -> Path:
    return Path(os.path.expanduser(name))


def find(name: str, uri: str | None, which: str = "last") -> Stored:
    """Return what is stored of a run id, a checkpoint folder, or a registered model (`models:/NAME@ALIAS`).

    `which` is `last`, `best` or a checkpoint's name. A damaged newest checkpoint is passed over for the one before. One
    that this machine has kept because the store was away counts.

    Raises:
        UserError: there is no such run, folder or checkpoint.
        StoreAway: the store cannot be reached, or does not give it.
    """
    if name.startswith("models:/"):
        return find(*_registered(name, uri))
    run_id = run_id_of(name)
    if run_id is None:
        found = read(_path(name))
        inner = found.path / "trainer"
        state = yaml12.load((inner / "state.json").read_text(), str(inner / "state.json"))
        return Stored(state["run_id"] or None, _config(inner / "config.yaml"), found)
    client = tracking.connect(uri)
    config = _config(tracking.artifact(client, run_id, "config/resolved.yaml"))
    sent = [n for n in tracking.folders(client, run_id, "checkpoints") if n.startswith("iter_")]
    kept = {path.name: path for path in tracking.upload_folder(run_id).glob("checkpoints/iter_*")}
    names = sorted({*sent, *kept}, key=lambda n: int(n.removeprefix("iter_")))

    def whole(checkpoint: str) -> Checkpoint:
        if checkpoint in sent:
            path = tracking.artifact(client, run_id, f"checkpoints/{checkpoint}")
            try:
                return read(path)
            except UserError:
                if checkpoint not in kept:  # else its upload was cut off
                    raise
        return read(kept[checkpoint])

    if which != "last":
        run = tracking.find_run(client, run_id)
        wanted = run.data.tags.get("grpo.best_checkpoint", "") if which == "best" else which
        if which == "best" and wanted not in names:
            log.warning("run %s: no checkpoint was evaluated, so none is the best; taking the last", run_id)
            return find(name, uri)
        if wanted not in names:
            raise UserError(f"run {run_id}: has no checkpoint {which!r}; allowed: best, last, {', '.join(names)}")
        return Stored(run_id, config, whole(wanted))
    for candidate in reversed(names):
        try:
            return Stored(run_id, config, whole(candidate))
        except StoreAway:  # what cannot be fetched now may be whole
            raise
        except UserError as error:
            log.warning("passed over: %s", error)
    return Stored(run_id, config, None)


def _registered(name: str, uri: str | None) -> tuple[str, str | None, str]:
    run_id, checkpoint = tracking.registered(tracking.connect(uri), name)
    return run_id, uri, checkpoint


def _config(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml12.load(path.read_text(), str(path))
    if "***" in str(content["tracking"]["uri"]):  # its password was not stored
        content["tracking"]["uri"] = None
    return content


def resolve_training(arguments: Arguments, resume: str) -> tuple[Resolved, Stored]:
    """Resolve the config of a training run that continues `resume`: that of the run, and the overrides.

    Raises:
        UserError: as `find`, or the run is no training run.
    """
    uri = parse_overrides(arguments.overrides).get("tracking.uri")
    if run_id := run_id_of(resume):
        kind = tracking.find_run(tracking.connect(uri), run_id).data.tags.get("grpo.kind", "train")
        if kind != "train":
            instead = _INSTEAD.get(kind, "a training run")
            raise UserError(f"resume = {resume!r}: is a run of {kind}, not of train; allowed: {instead}")
    stored = find(resume, uri)
    return resolve("", arguments.overrides, base=stored.config, origin=f"resume {resume}"), stored


def resolve_evaluation(arguments: Arguments, model: str, checkpoint: str) -> tuple[Resolved, str | Path]:
    """Resolve the config of an evaluation of `model`, and what to load.

    A run (its checkpoint of this name, `best` or `last`) or a checkpoint folder of ours brings its own config.
    """
    tracked = run_id_of(model) is not None or model.startswith("models:/")
    ours = tracked or (_path(model) / "trainer" / "config.yaml").is_file()
    if not ours:
        overrides: Sequence[str] = (*arguments.overrides, f"model.train_id={model}")
        return resolve(arguments.config, overrides), model
    stored = find(model, parse_overrides(arguments.overrides).get("tracking.uri"), checkpoint)
    if stored.checkpoint is None:
        raise UserError(f"run {stored.run_id}: has no checkpoint yet")
    if arguments.config:
        return resolve(arguments.config, arguments.overrides), stored.checkpoint.path
    return resolve("", arguments.overrides, base=stored.config, origin=f"run {model}"), stored.checkpoint.path
