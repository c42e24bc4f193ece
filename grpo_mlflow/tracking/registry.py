"""The registry of models: versions, the aliases that name them, and the studies that these belong to."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from grpo_mlflow.errors import UserError, one_line
from grpo_mlflow.tracking import models
from grpo_mlflow.tracking.borders import STORE_ERRORS

CHAMPION = "champion"  # the alias of the newest version: the winner of a study, or the best checkpoint of a run
STUDY_TAG = "grpo.study_run"  # of a registered version: the parent run of its study, or the run that it is of
WEIGHTS_TAG = models.WEIGHTS  # of a registered version that says which weights it was made for
log = logging.getLogger(__name__)


def registered(client: mlflow.MlflowClient, uri: str) -> tuple[str, str]:
    """Return the run and the checkpoint's name behind `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Raises:
        UserError: there is no such model, or it is no checkpoint of a run of ours.
    """
    name = uri.removeprefix("models:/")
    try:
        if "@" in name:
            found = client.get_model_version_by_alias(*name.split("@", 1))
        else:
            found = client.get_model_version(*name.split("/", 1))
    except (*STORE_ERRORS, TypeError) as error:
        raise UserError(
            f"model {uri!r}: {one_line(error)}; allowed: models:/NAME@ALIAS, models:/NAME/VERSION"
        ) from error
    if not found.run_id or "/checkpoints/" not in found.source:
        raise UserError(f"model {uri!r}: its source {found.source!r} is not a checkpoint of a run")
    return found.run_id, found.source.rstrip("/").rsplit("/", 1)[-1]


def alias_of(alias: str, study: str) -> str:
    """Return the alias for what another study (its parent run) has named, so that nothing loses its name."""
    return f"{alias}-{study[:8]}"


def study_of_alias(client: mlflow.MlflowClient, name: str, alias: str) -> str | None:
    """Return the parent run of the study whose version an alias names; None without one, or if the store is away."""
    try:
        version = _version_of(client, name, alias)
        return _study_of(client, version) if version is not None else None
    except STORE_ERRORS as error:
        log.warning("MLflow is away, so it is not known what %s names: %s", alias, one_line(error))
        return None


def _version_of(client: mlflow.MlflowClient, name: str, alias: str) -> ModelVersion | None:
    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # no such model, or alias
            return None
        raise


def _study_of(client: mlflow.MlflowClient, version: ModelVersion) -> str:
    """Return the parent run of the study of a version; one that an earlier version registered has no tag."""
    if study := version.tags.get(STUDY_TAG):
        return str(study)
    try:
        return str(client.get_run(version.run_id).data.tags["mlflow.parentRunId"])
    except (MlflowException, KeyError):
        return f"v{version.version}"  # its run is gone


def register(
    client: mlflow.MlflowClient, name: str, alias: str, run_id: str, artifact: str, tags: Mapping[str, str]
) -> None:
    """Make an artifact of a run the newest version of a registered model, once, and let the alias name it.

    Of `tags` one may be `description`, and `WEIGHTS_TAG` the digest of the weights: other weights at the same place are
    another version. Where the alias names a version of another study (`STUDY_TAG`), that one gets an
    alias of its own (`alias_of`) first.
    """
    source = f"{client.get_run(run_id).info.artifact_uri}/{artifact}"
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    weights, found = tags.get(WEIGHTS_TAG), client.search_model_versions(f"name = '{name}'")
    known = [v for v in found if v.source == source and weights in (None, v.tags.get(WEIGHTS_TAG, weights))]
    newest = max(known, key=lambda v: int(v.version), default=None)
    version = newest or client.create_model_version(name, source, run_id)
    models.note_version(client, run_id, artifact.rpartition("/")[2], name, version.version)
    for key, value in tags.items():
        if key == "description":
            client.update_model_version(name, version.version, value)
        else:
            client.set_model_version_tag(name, version.version, key, value)
    before = _version_of(client, name, alias)
    if before is not None and before.version != version.version:
        other = _study_of(client, before)
        if other != tags.get(STUDY_TAG):
            client.set_registered_model_alias(name, alias_of(alias, other), before.version)
    client.set_registered_model_alias(name, alias, version.version)
