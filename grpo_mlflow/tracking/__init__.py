"""MLflow: the one package that imports it."""

from grpo_mlflow.tracking.base import NullTracker, Tracker
from grpo_mlflow.tracking.opening import start
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
