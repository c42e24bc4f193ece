"""Folders of weights on their way from the trainer to a server."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path


class WeightsFolder:
    """Writes each version to a folder of its own under `root` (None: a temporary one), and keeps the newest only."""

    def __init__(self, root: str | None) -> None:
        self._given = root
        self._root: Path | None = None
        self._run = uuid.uuid4().hex[:8]
        self.newest: Path | None = None

    def write(self, save: Callable[[Path], None], version: int) -> Path:
        """Let `save` write into a new folder, and return the folder, whose name no other run and version has.

        The folder appears whole or not at all, and the one before goes only then.
        """
        if self._root is None:
            self._root = Path(self._given).absolute() if self._given else Path(tempfile.mkdtemp(prefix="grpo-weights-"))
        folder = self._root / f"{self._run}-{version}"
        partial = self._partial()
        partial.mkdir(parents=True)
        save(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        former, self.newest = self.newest, folder
        if former is not None and former != folder:
            shutil.rmtree(former, ignore_errors=True)
        return folder

    def close(self) -> None:
        """Delete what was written."""
        if self._root is None:
            return
        self._partial()
        if self.newest is not None:
            shutil.rmtree(self.newest, ignore_errors=True)
        if self._given is None:
            shutil.rmtree(self._root, ignore_errors=True)

    def _partial(self) -> Path:
        """Return where to write, free of what an interrupted write left."""
        assert self._root is not None
        partial = self._root / f".{self._run}"
        shutil.rmtree(partial, ignore_errors=True)
        return partial
