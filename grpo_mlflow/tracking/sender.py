"""Sends what an outbox keeps in a thread of its own: no call to a store holds up training."""

from __future__ import annotations

import logging
import math
import threading
import time

from grpo_mlflow.runtime import interrupts
from grpo_mlflow.tracking.operation import Operation
from grpo_mlflow.tracking.outbox import Outbox

_SLICE_SECONDS = 1.0  # what was sent before a kill is sent again from here
_LOOK_SECONDS = 0.1  # for a signal, which must not wait for the store
_TELL_SECONDS = 5.0
_LAST_SECONDS = 2.0  # for what is being sent when a signal waits, or nothing more is to be

log = logging.getLogger(__name__)


class Sender:
    """Takes operations for an outbox and sends them in order, as soon as the store takes them."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._changed = threading.Condition()
        self._ended = False
        self._thread: threading.Thread | None = None

    def send(self, operation: Operation) -> None:
        """Send the operation some time after this has returned; it is on the disk then.

        Raises:
            OSError: neither the disk nor the store takes it.
        """
        self._outbox.keep(operation)
        self._begin()

    def settle(self, seconds: float | None = None) -> None:
        """Wait until all is sent, but not while the store is away, and after a signal for a moment only.

        For so long at most; None: as long as each call to the store takes no longer than it may (`Outbox.patience`).
        """
        if self._ended or not self._outbox.waits():
            return
        began = time.monotonic()
        until, tell_at = None if seconds is None else began + seconds, began + _TELL_SECONDS
        with self._changed:
            while self._outbox.waits() and self._outbox.hurry(began):
                self._begin()
                if interrupts.waits():
                    until = min(until or math.inf, time.monotonic() + _LAST_SECONDS)
                left = self._outbox.patience() if until is None else until - time.monotonic()
                if left <= 0:
                    return
                if until is None and time.monotonic() >= tell_at:
                    log.warning("waiting for MLflow to take what is in %s; Ctrl-C leaves it there", self._outbox.path)
                    tell_at = math.inf
                self._changed.wait(min(left, _LOOK_SECONDS))

    def end(self) -> None:
        """Send nothing more: what waits is left to a resume, or to `upload`."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._outbox.close(_LAST_SECONDS)

    def _begin(self) -> None:
        with self._changed:
            if not self._ended and (self._thread is None or not self._thread.is_alive()):
                self._thread = threading.Thread(target=self._run, name="mlflow-sender", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._ended and (not self._outbox.waits() or self._outbox.rest):
                    self._changed.wait(self._outbox.rest or None)
                if self._ended:
                    return
            self._outbox.replay(_SLICE_SECONDS)
            with self._changed:
                self._changed.notify_all()
