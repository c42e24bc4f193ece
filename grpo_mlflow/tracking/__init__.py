"""MLflow: the one package that imports it."""

from grpo_mlflow.tracking.base import NullTracker, Tracker
from grpo_mlflow.tracking.borders import STORE_ERRORS
from grpo_mlflow.tracking.models import NOTE, Kept, checkpoint_address
from grpo_mlflow.tracking.opening import start
from grpo_mlflow.tracking.ownership import require_free
from grpo_mlflow.tracking.places import elsewhere, place, run_folder
from grpo_mlflow.tracking.registry import CHAMPION, STUDY_TAG, alias_of, registered, study_of_alias
from grpo_mlflow.tracking.store import (
    address,
    artifact,
    child,
    connect,
    discard,
    end_abandoned,
    files,
    find_run,
    folders,
    has_artifact,
    lives,
    set_failed,
    upload_folder,
)
from grpo_mlflow.tracking.upload import Upload, kept_file, send_file, send_kept, send_kept_below, upload

__all__ = [
    "CHAMPION",
    "NOTE",
    "STORE_ERRORS",
    "STUDY_TAG",
    "Kept",
    "NullTracker",
    "Tracker",
    "Upload",
    "address",
    "alias_of",
    "artifact",
    "checkpoint_address",
    "child",
    "connect",
    "discard",
    "elsewhere",
    "end_abandoned",
    "files",
    "find_run",
    "folders",
    "has_artifact",
    "kept_file",
    "lives",
    "place",
    "registered",
    "require_free",
    "run_folder",
    "send_file",
    "send_kept",
    "send_kept_below",
    "set_failed",
    "start",
    "study_of_alias",
    "upload",
    "upload_folder",
]
