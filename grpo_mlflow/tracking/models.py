"""Checkpoints as MLflow's logged models: their page, with the figures of their evaluations, and what loads them.

A logged model has a folder of its own, and nothing else may be its place. In a local store its files are links to those
of the checkpoint: the weights are stored once, and are gone when both are deleted. Elsewhere a second upload would be a
second copy, so the model stays without files and its tag `grpo.artifact` says where they are.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow.entities import Dataset, LoggedModel, LoggedModelInput, LoggedModelOutput, LoggedModelStatus, Metric, Run
from mlflow.exceptions import MlflowException

from grpo_mlflow.errors import one_line
from grpo_mlflow.runtime.files import write_whole
from grpo_mlflow.tasks.data_sets import EVALUATION, GENERATED
from grpo_mlflow.tracking.borders import STORE_ERRORS
from grpo_mlflow.tracking.store import local_path

CHECKPOINT, _ARTIFACT, WEIGHTS = "grpo.checkpoint", "grpo.artifact", "grpo.weights"
AS = "grpo.kept"  # what a checkpoint is kept as: best, last
NOTE = "mlflow.note.content"  # the description on the page of a model, which people edit
_VERSIONS = "mlflow.modelVersions"  # from which the page of a model says how it is registered
# What training goes on with, larger than the weights, and what the run notes.
_NOT_ITS_OWN = ("trainer", "manifest.json", "registered")
_ONE_OF_MLFLOWS = "MLmodel"


@dataclass(frozen=True, slots=True)
class Kept:
    """A checkpoint of a run that is to be a model: `checkpoint` is its name, as `iter_012`, `weights` their digest.

    `metrics` are those of its evaluation at `step`, on the data set that its run is evaluated on.
    """

    checkpoint: str
    name: str
    weights: str
    step: int
    params: Mapping[str, str]
    tags: Mapping[str, str]
    metrics: Mapping[str, float]


def checkpoint_address(run_id: str, name: str) -> str:
    """Return the address by which MLflow finds a checkpoint of a run."""
    return f"runs:/{run_id}/checkpoints/{name}"


def keep(client: mlflow.MlflowClient, run_id: str, kept: Sequence[Kept]) -> None:
    """Make checkpoints of a run models, once each, and hide those of its models whose checkpoints are gone.

    What one of them is kept as (`AS`: the best, the last) no other model of the run is from then on.
    """
    if (run := _run(client, run_id)) is None:
        return
    known = _of_run(client, run)
    there = _names(client, run_id, "checkpoints")
    for each in kept:
        place = f"checkpoints/{each.checkpoint}"
        if each.checkpoint not in there or _ONE_OF_MLFLOWS not in _names(
            client, run_id, place
        ):  # deleted since, or written by an earlier version
            continue
        own = {
            CHECKPOINT: each.checkpoint,
            _ARTIFACT: checkpoint_address(run_id, each.checkpoint),
            WEIGHTS: each.weights,
        }
        tags, model = {**each.tags, **own}, known.get(each.checkpoint)
        if model is not None and model.tags.get(WEIGHTS) != each.weights:  # of a branch that the run has left
            _hide(client, model)
            model = None
        if model is None:
            model = client.create_logged_model(run.info.experiment_id, each.name, run_id, tags, dict(each.params))
        _finish(client, run, model, place)
        client.set_logged_model_tags(model.model_id, {key: value for key, value in tags.items() if key != NOTE})
        _log(client, run, model, each.metrics, each.step)
        if model.model_id not in {output.model_id for output in _outputs(run)}:  # a second time is refused
            client.log_outputs(run_id, [LoggedModelOutput(model.model_id, each.step)])
    for checkpoint, model in known.items():
        if checkpoint not in there and _VERSIONS not in model.tags:
            _hide(client, model)
        elif checkpoint not in {each.checkpoint for each in kept}:
            _take_roles(client, model, {role for each in kept for role in _roles(each.tags)})


def measured(
    client: mlflow.MlflowClient, run_id: str, owner: str, checkpoint: str, metrics: Mapping[str, float]
) -> None:
    """Let what run `run_id` has measured stand with the model of a checkpoint of the run `owner`, if there is one."""
    model = find(client, owner, checkpoint)
    if model is not None:
        client.log_inputs(run_id, models=[LoggedModelInput(model.model_id)])
        _log(client, client.get_run(run_id), model, metrics, 0)


def find(client: mlflow.MlflowClient, run_id: str, checkpoint: str) -> LoggedModel | None:
    """Return the model of a checkpoint of a run; None without one, or where the run is not in this store."""
    run = _run(client, run_id)
    return _of_run(client, run).get(checkpoint) if run is not None else None


def note_version(client: mlflow.MlflowClient, run_id: str, checkpoint: str, name: str, version: str) -> None:
    """Let the page of a checkpoint's model name a version that it is registered as."""
    model = find(client, run_id, checkpoint)
    if model is None:
        return
    versions = json.loads(model.tags.get(_VERSIONS, "[]"))
    this = {"name": name, "version": int(version)}
    if this not in versions:
        client.set_logged_model_tags(model.model_id, {_VERSIONS: json.dumps([*versions, this])})


def _names(client: mlflow.MlflowClient, run_id: str, folder: str) -> set[str]:
    """Return what an artifact folder holds.

    Raises:
        Exception: the store is away. The client of an object store has errors of its own for that.
    """
    try:
        return {Path(entry.path).name for entry in client.list_artifacts(run_id, folder)}
    except STORE_ERRORS:
        raise
    except Exception as error:
        raise MlflowException(one_line(error)) from error


def _run(client: mlflow.MlflowClient, run_id: str) -> Run | None:
    """Return a run; None for one of another store, or deleted for good: to ask again would hold up all that waits."""
    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _of_run(client: mlflow.MlflowClient, run: Run) -> dict[str, LoggedModel]:
    """Return the models of a run by the names of their checkpoints."""
    found: dict[str, LoggedModel] = {}
    token = None
    while True:
        page = client.search_logged_models(
            [run.info.experiment_id], f"source_run_id = '{run.info.run_id}'", page_token=token
        )
        found |= {model.tags[CHECKPOINT]: model for model in page if CHECKPOINT in model.tags}
        if not (token := page.token):
            return found


def _roles(tags: Mapping[str, str]) -> list[str]:
    return [role for role in tags.get(AS, "").split(", ") if role]


def _take_roles(client: mlflow.MlflowClient, model: LoggedModel, taken: set[str]) -> None:
    """Take what other models are kept as now from a model."""
    before = _roles(model.tags)
    left = [role for role in before if role not in taken]
    if left and left != before:
        client.set_logged_model_tags(model.model_id, {AS: ", ".join(left)})
    elif before and not left:
        client.delete_logged_model_tag(model.model_id, AS)


def _hide(client: mlflow.MlflowClient, model: LoggedModel) -> None:
    """Delete a model, and its links: they would keep the weights on the disk, since MLflow leaves a model's files."""
    folder = local_path(model.artifact_location)
    if folder is not None and model.model_id in folder.parts and _VERSIONS not in model.tags:
        shutil.rmtree(folder, ignore_errors=True)  # first, as nobody finds the model again
    client.delete_logged_model(model.model_id)


def _finish(client: mlflow.MlflowClient, run: Run, model: LoggedModel, place: str) -> None:
    if model.status == LoggedModelStatus.READY:
        return
    source, target = local_path(run.info.artifact_uri), local_path(model.artifact_location)
    if source is not None and target is not None:
        _link(source / place, target, model.model_id)
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)


def _link(source: Path, target: Path, model_id: str) -> None:
    """Link the files of a checkpoint into the folder of its model; leave that empty where this is not possible."""
    try:
        # `MLmodel` last and whole: with it the folder counts as a model, and what is there is not written again
        for file in sorted(source.rglob("*"), key=lambda file: (file.name == _ONE_OF_MLFLOWS, file)):
            inner = file.relative_to(source)
            if inner.parts[0] in _NOT_ITS_OWN or file.is_dir() or (target / inner).exists():
                continue
            (target / inner).parent.mkdir(parents=True, exist_ok=True)
            if file.name == _ONE_OF_MLFLOWS:
                write_whole(target / inner, file.read_text().replace("model_id: null", f"model_id: {model_id}", 1))
            else:
                os.link(file, target / inner)
    except OSError:  # deleted meanwhile, or on a file system without links
        shutil.rmtree(target, ignore_errors=True)


def _log(client: mlflow.MlflowClient, run: Run, model: LoggedModel, metrics: Mapping[str, float], step: int) -> None:
    """Log metrics of a model that its run has, too: at the same time of the same step they are no second points."""
    if not metrics:
        return
    run_id, data = run.info.run_id, _evaluated_on(run)
    name, digest = (data.name, data.digest) if data else (None, None)
    known = client.get_metric_history(run_id, next(iter(metrics)))
    at = next((point.timestamp for point in known if point.step == step), run.info.start_time)
    points = [Metric(key, value, at, step, model.model_id, name, digest, run_id) for key, value in metrics.items()]
    client.log_batch(run_id, metrics=points)


def _evaluated_on(run: Run) -> Dataset | None:
    """Return the data set of a run's evaluations; that of a mix stands beside those of its members."""
    inputs = run.inputs.dataset_inputs if run.inputs else []
    found = [each.dataset for each in inputs if EVALUATION in (tag.value for tag in each.tags)]
    return next((each for each in found if each.source_type == GENERATED), found[0] if found else None)


def _outputs(run: Run) -> list[LoggedModelOutput]:
    return list(run.outputs.model_outputs) if run.outputs else []
