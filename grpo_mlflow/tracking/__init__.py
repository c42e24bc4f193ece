"""MLflow: the one package that imports it."""

from grpo_mlflow.tracking.base import NullTracker, Tracker
from grpo_mlflow.tracking.opening import start
from grpo_mlflow.tracking.ownership import require_free
from grpo_mlflow.tracking.store import (
    STORE_ERRORS,
    STUDY_TAG,
    alias_of,
    artifact,
    child,
    connect,
    end_abandoned,
    files,
    find_run,
    folders,
    lives,
    registered,
    set_failed,
    study_of_alias,
    upload_folder,
)

__all__ = [
    "STORE_ERRORS",
    "STUDY_TAG",
    "NullTracker",
    "Tracker",
    "alias_of",
    "artifact",
    "child",
    "connect",
    "end_abandoned",
    "files",
    "find_run",
    "folders",
    "lives",
    "registered",
    "require_free",
    "set_failed",
    "start",
    "study_of_alias",
    "upload_folder",
]
