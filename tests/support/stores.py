"""Empty MLflow stores: their schema takes most of a second to make, so it is made once and copied."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

import mlflow
import pytest


class Stores:
    """Makes empty stores from one that all workers of a test run share, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._template = folder / "mlflow.db"

    def new(self, folder: Path) -> str:
        """Make an empty store in a folder and return its address."""
        self._make_template()
        shutil.copyfile(self._template, folder / "mlflow.db")
        return f"sqlite:///{folder}/mlflow.db"

    def _make_template(self) -> None:
        if self._template.exists():
            return
        with (self._template.parent / "mlflow.lock").open("w") as lock, pytest.MonkeyPatch.context() as patch:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one worker makes it, the others wait
            if not self._template.exists():
                patch.chdir(self._template.parent)  # the artifacts of MLflow's own experiment go to where it is made
                mlflow.MlflowClient("sqlite:///half-made.db").search_experiments()
                os.rename("half-made.db", self._template)
