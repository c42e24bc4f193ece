"""What a name stands for: `tiny`, a hub id, a folder, a checkpoint of ours, an MLflow run id or registered model."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from grpo_mlflow import tracking
from grpo_mlflow.config import Arguments, Config, Resolved, flatten, parse_overrides, resolve, resuming, yaml12
from grpo_mlflow.config.command import run_id_of
from grpo_mlflow.errors import ConfigError, StoreAway, UserError, one_line
from grpo_mlflow.runs.description import SETTINGS
from grpo_mlflow.runtime.files import remove_parts
from grpo_mlflow.tasks import data_sets
from grpo_mlflow.training.checkpoint import Checkpoint, held_after, is_name, iteration_of, read, reading

_INSTEAD = {
    "optimize": "the same optimize command again, which continues the study",
    "evaluate": "evaluate, which measures a model again",
}
_KEYS = flatten(Config().model_dump(mode="json")).keys()
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Stored:
    """The run behind a name: its config, and the checkpoint asked for (None where it has none that is whole).

    `damaged` names the checkpoints that are not whole, where that is all of them.
    """

    run_id: str | None
    config: dict[str, Any]
    checkpoint: Checkpoint | None
    damaged: tuple[str, ...] = ()


class NotBegun(UserError):
    """A run was killed before it had written what it could be resumed with."""


def _path(name: str) -> Path:
    return Path(os.path.expanduser(name))


def find(name: str, uri: str | None, which: str = "last") -> Stored:
    """Return what is stored of a run id, a checkpoint folder, or a registered model (`models:/NAME@ALIAS`).

    `which` is `last`, `best` or a checkpoint's name, of a run. A damaged newest checkpoint is passed over for the one
    before. One that this machine has kept because the store was away counts. A run whose own config is not whole has
    that of its newest checkpoint.

    Raises:
        NotBegun: the run has neither.
        UserError: there is no such run, folder or checkpoint.
        StoreAway: the store cannot be reached, or does not give it.
    """
    if name.startswith("models:/"):
        run_id, checkpoint = tracking.registered(tracking.connect(uri), name)
        return _Run(run_id, uri).stored(checkpoint)
    if run := run_id_of(name):
        return _Run(run, uri).stored(which)
    return _in_folder(_path(name))


def _in_folder(path: Path) -> Stored:
    found = read(path)
    inner = found.path / "trainer"
    with reading(inner / "state.json"):
        run_id = yaml12.load((inner / "state.json").read_text(), str(inner / "state.json"))["run_id"]
    return Stored(run_id or None, config_in(inner / "config.yaml"), found)


class _Run:
    """A run with its config and its checkpoints: those in the store, and those that only this machine has."""

    def __init__(self, run_id: str, uri: str | None) -> None:
        self._client, self._run_id = tracking.connect(uri), run_id
        self._sent = list(filter(is_name, tracking.folders(self._client, run_id, "checkpoints")))
        kept = tracking.upload_folder(run_id).glob("checkpoints/*")
        self._kept = {path.name: path for path in kept if is_name(path.name)}
        self._names = sorted({*self._sent, *self._kept}, key=iteration_of)

    def stored(self, which: str) -> Stored:
        """Return the run with its checkpoint `last`, `best`, or of this name."""
        config = self._config()
        checkpoint = self._last if which == "last" else self._chosen(which)
        return Stored(self._run_id, config, checkpoint, () if checkpoint else tuple(self._names))

    def _config(self) -> dict[str, Any]:
        """Return the config of the run, or that of its newest checkpoint if it is not whole.

        Every setting of it is also a parameter of the run, so one that the file lacks was cut off.
        """
        needed, name = tracking.find_run(self._client, self._run_id).data.params.keys() & _KEYS, SETTINGS
        try:
            if (kept := tracking.kept_file(self._run_id, name)) is not None:
                return _whole(kept, needed)
            return _whole(tracking.artifact(self._client, self._run_id, name), needed)
        except StoreAway:
            raise
        except UserError as error:
            checkpoint = self._last
            if checkpoint is None:
                raise NotBegun(str(error)) from error
            log.warning("run %s: %s; taking that of %s", self._run_id, error, checkpoint.path.name)
            return config_in(checkpoint.path / "trainer" / "config.yaml")

    @cached_property
    def _last(self) -> Checkpoint | None:
        """Return the newest checkpoint that is whole; None without one."""
        for candidate in reversed(self._names):
            try:
                return self._read(candidate)
            except StoreAway:  # what cannot be fetched now may be whole
                raise
            except UserError as error:
                log.warning("passed over: %s", error)
        return None

    def _chosen(self, which: str) -> Checkpoint | None:
        tags = tracking.find_run(self._client, self._run_id).data.tags
        name = tags.get("grpo.best_checkpoint", "") if which == "best" else which
        if name in self._names:
            return self._read(name)
        if which == "best":
            log.warning("run %s: no checkpoint was evaluated, so none is the best; taking the last", self._run_id)
            return self._last
        allowed = ", ".join(self._names)
        raise UserError(f"run {self._run_id}: has no checkpoint {which!r}; allowed: best, last, {allowed}")

    def _read(self, name: str) -> Checkpoint:
        if name in self._sent:
            path = tracking.artifact(self._client, self._run_id, f"checkpoints/{name}")
            try:
                return read(path)
            except UserError:
                if name not in self._kept:  # else its upload was cut off
                    raise
        return read(self._kept[name])


def _whole(path: Path, needed: Collection[str]) -> dict[str, Any]:
    """Return the config in a file.

    Raises:
        UserError: it is cut off, so that settings are missing, `needed` ones or the end of the last line.
    """
    try:
        text = path.read_text()
        content = yaml12.load(text, str(path))
    except (OSError, ValueError, ConfigError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error
    lacking = sorted(set(needed) - flatten(content).keys()) if isinstance(content, dict) else [*needed]
    if lacking or not text.endswith("\n"):
        raise UserError(f"{path} is cut off")
    return config_in(path)


def config_in(path: Path) -> dict[str, Any]:
    """Return the config in a file of a run.

    Raises:
        ModelError: it holds none.
    """
    with reading(path):
        content: dict[str, Any] = yaml12.load(path.read_text(), str(path))
        if "***" in str(content.get("tracking", {}).get("uri")):  # its password was not stored
            content["tracking"]["uri"] = None
    return content


def resolve_training(arguments: Arguments, resume: str) -> tuple[Resolved, Stored]:
    """Resolve the config of a training run that continues `resume`: that of the run, and the overrides.

    Raises:
        UserError: as `find`, the run is no training run, or a setting that cannot change differs from the run's.
    """
    uri = parse_overrides(arguments.overrides).get("tracking.uri")
    run_id, tags = run_id_of(resume), dict[str, str]()
    if run_id:
        run = tracking.find_run(tracking.connect(uri), run_id)
        tags = run.data.tags
        kind = tags.get("grpo.kind", "train")
        if kind != "train":
            instead = _INSTEAD.get(kind, "a training run")
            raise UserError(f"resume = {resume!r}: is a run of {kind}, not of train; allowed: {instead}")
        tracking.require_free(uri, run_id)
    try:
        stored = find(resume, uri)
    except NotBegun as error:
        _require_here(resume, run_id, uri)
        if run_id and "grpo.kind" in tags:  # it is ours, and nothing else would ever end it
            tracking.set_failed(uri, run_id)
            remove_parts(tracking.run_folder(run))
            line = f"{error}: it ended before it had written one, and is marked FAILED now; allowed: a new run"
            raise NotBegun(line) from error
        raise
    if stored.damaged:
        raise UserError(
            f"resume = {resume!r}: none of its checkpoints is whole ({', '.join(stored.damaged)}), and from the "
            "beginning it would log every iteration again; allowed: a whole checkpoint's folder, or a new run"
        )
    if stored.checkpoint is None:
        _require_here(resume, stored.run_id, uri)
    else:
        _require_none_held_after(stored.checkpoint, stored.run_id, uri)
    overrides = resuming.changes(arguments, stored.config)
    resolved = resolve("", overrides, base=stored.config, origin=f"resume {resume}")
    _require_same_rows(resume, tags, resolved.config)
    return resolved, stored


def _require_same_rows(resume: str, tags: Mapping[str, str], config: Config) -> None:
    """Raise UserError if the run began with other rows: its seeds would name other problems."""
    if data_sets.changed(config, tags):
        raise UserError(
            f"resume = {resume!r}: its rows have changed since it began; allowed: the rows as they were, or a new run, "
            "which may begin with model.train_id=CHECKPOINT"
        )


def _require_none_held_after(checkpoint: Checkpoint, run_id: str | None, uri: str | None) -> None:
    """Raise UserError if going on from a checkpoint would replace a later one that a registered model is made of."""
    if run_id is None:
        return
    folder = tracking.run_folder(tracking.find_run(tracking.connect(uri), run_id)) / "checkpoints"
    if held := held_after(folder, checkpoint.iteration):
        raise UserError(
            f"resume from {checkpoint.path.name}: {', '.join(held)} in {folder} is registered as a model, and this "
            f"branch would replace it; allowed: a resume from {held[-1]} or later, or a new run with "
            f"model.train_id={checkpoint.path}"
        )


def _require_here(resume: str, run_id: str | None, uri: str | None) -> None:
    """Raise UserError if a run without a checkpoint in the store may have some elsewhere."""
    if run_id and (where := tracking.elsewhere(uri, run_id)) is not None:
        raise UserError(
            f"resume = {resume!r}: MLflow has no checkpoint of it, and what it has kept is in {where}; from here it "
            "would begin again at 0; allowed: to resume it there, the command upload there first, or a new run"
        )


def resolve_evaluation(arguments: Arguments, model: str, checkpoint: str) -> tuple[Resolved, str | Path]:
    """Resolve the config of an evaluation of `model`, and what to load.

    A run (its checkpoint of this name, `best` or `last`) or a checkpoint folder of ours brings its own config.
    """
    tracked = run_id_of(model) is not None or model.startswith("models:/")
    ours = tracked or os.path.isfile(_path(model) / "trainer" / "config.yaml")
    if not ours:
        overrides: Sequence[str] = (*arguments.overrides, f"model.train_id={model}")
        return resolve(arguments.config, overrides), model
    stored = find(model, parse_overrides(arguments.overrides).get("tracking.uri"), checkpoint)
    if stored.checkpoint is None:
        damaged = f"; not whole: {', '.join(stored.damaged)}" if stored.damaged else " yet"
        raise UserError(f"run {stored.run_id}: has no checkpoint{damaged}")
    if arguments.config:
        return resolve(arguments.config, arguments.overrides), stored.checkpoint.path
    origin = f"run {model}"
    resolved = resolve("", arguments.overrides, base=stored.config, origin=origin, named_anew=True)
    return resolved, stored.checkpoint.path
