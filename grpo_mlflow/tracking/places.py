"""Where the files of a run lie, and what waits there for a store that was away."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path

from mlflow.entities import Run

from grpo_mlflow.tracking.store import connect, find_run, local_path, upload_folder

COMMAND, ANSWER = "grpo.command", "grpo.command_answer"
_HOST, _FOLDER, ENDED = "grpo.host", "grpo.folder", "grpo.ended"


def run_folder(run: Run) -> Path:
    """Return the folder of a run's files: that of its artifacts, else the one that they are sent from."""
    return local_path(run.info.artifact_uri) or upload_folder(run.info.run_id)


def of_this_process(run_dir: Path) -> dict[str, str]:
    """Return the tags that say where a run keeps its files."""
    return {_HOST: socket.gethostname(), _FOLDER: str(run_dir)}


def elsewhere(uri: str | None, run_id: str) -> str | None:
    """Return where else a run may have kept what the store lacks, in words; None if nowhere.

    Its end is the last that is sent: a run that has one has kept nothing. A folder of the same name that is there, on
    whatever machine, is the same one.

    Raises:
        UserError: there is no such run.
        StoreAway: the store cannot be reached.
    """
    run = find_run(connect(uri), run_id)
    tags: Mapping[str, str] = run.data.tags
    here = run_folder(run)
    if _FOLDER not in tags or ENDED in tags or (Path(tags[_FOLDER]) == here and here.is_dir()):
        return None
    return place(tags)


def place(tags: Mapping[str, str]) -> str:
    """Return where a run keeps its files, in words."""
    return f"{tags.get(_FOLDER, 'its folder')} on {tags.get(_HOST, 'its machine')}"
