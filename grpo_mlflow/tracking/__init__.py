"""MLflow: the one package that imports it."""

from grpo_mlflow.tracking.store import (
    STORE_ERRORS,
    artifact,
    child,
    connect,
    end_abandoned,
    exists,
    files,
    find_run,
    folders,
    registered,
    set_failed,
    upload_folder,
)
from grpo_mlflow.tracking.tracker import NullTracker, Tracker, start

__all__ = [
    "STORE_ERRORS",
    "NullTracker",
    "Tracker",
    "artifact",
    "child",
    "connect",
    "end_abandoned",
    "exists",
    "files",
    "find_run",
    "folders",
    "registered",
    "set_failed",
    "start",
    "upload_folder",
]
