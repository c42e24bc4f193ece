"""Writes the report of a run while it trains: in a thread, so that training does not wait for it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from grpo_mlflow import tracking
from grpo_mlflow.config import Config
from grpo_mlflow.errors import one_line
from grpo_mlflow.runs import report
from grpo_mlflow.runs.next_steps import Place
from grpo_mlflow.runtime.files import write_whole
from grpo_mlflow.tracking import Tracker
from grpo_mlflow.training.progress import Progress

_LAST_SECONDS = 10.0  # for a page that is being written when the run ends
_PAUSE_SECONDS = 5.0  # between two pages, or they would take a hundredth of a run with short iterations
log = logging.getLogger(__name__)


class Reporter:
    """Writes the page within seconds of each evaluation, and at the end. What fails is told, and never ends a run.

    Args:
        resumed: whether earlier files of the run may be in the store alone.
    """

    def __init__(self, config: Config, tracker: Tracker, resumed: bool = False) -> None:
        self._config, self._tracker = config, tracker
        self._files = report.Files(tracker.run_dir)
        self._settings: list[report.Differing] = []
        self._fetches = resumed
        self._changed, self._writing = threading.Condition(), threading.Lock()
        self._waiting: Progress | None = None
        self._noted: Progress | None = None
        self._ended = self._failed = False
        self._thread: threading.Thread | None = None

    def note(self, progress: Progress) -> None:
        """Write the page some time after this has returned; of several that wait, the last."""
        with self._changed:
            self._waiting = self._noted = progress
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def end(self, progress: Progress) -> None:
        """Write the last page, of the run as it ends."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(_LAST_SECONDS)
        noted = self._noted
        if noted is not None and noted.iteration == progress.iteration and not progress.evaluated:
            progress = noted  # a study has pruned it at this evaluation
        finished = progress.iteration >= self._config.train.iterations
        if self._writing.acquire(timeout=_LAST_SECONDS):  # kept: nothing is written after the last page
            self._write(progress, "finished" if finished else "ended early", self._tracker.publish)

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._waiting is None and not self._ended:
                    self._changed.wait()
                progress, self._waiting = self._waiting, None
            if progress is None:
                return
            self._fetch()
            if self._ended:  # the last page says all that this one would
                return
            with self._writing:
                if not self._ended:
                    self._write(progress, "in training", self._tracker.publish_aside)
            with self._changed:
                self._changed.wait_for(lambda: self._ended, _PAUSE_SECONDS)

    def _write(self, progress: Progress, state: str, publish: Callable[[str], None]) -> None:
        tracker, config = self._tracker, self._config
        try:
            self._settings = self._settings or report.differing(config)
            place = Place.of(tracker)
            page = report.page(self._files, config, progress, place, state=state, settings=self._settings)
            write_whole(tracker.run_dir / report.NAME, page)
            publish(report.NAME)
        except Exception as error:  # a full disk, files of another version: training matters more
            if not self._failed:
                log.warning("%s could not be written: %s", report.NAME, one_line(error))
            self._failed = True

    def _fetch(self) -> None:
        """Fetch once what an earlier process of the run has written on another machine, if it has."""
        fetches, self._fetches = self._fetches, False
        if fetches and not self._files.figures("train", [0]):
            for name in ("metrics", "samples"):
                self._look_in_store(name)

    def _look_in_store(self, name: str) -> None:
        try:
            client = tracking.connect(self._config.tracking.uri)
            self._files.look_also(Path(tracking.artifact(client, self._tracker.run_id, name)).parent)
        except Exception as error:  # it is away, has none, or its client fails: the page shows what is here
            log.debug("no earlier figures: %s", one_line(error))
