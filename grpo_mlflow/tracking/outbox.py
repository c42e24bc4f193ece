"""Operations on their way to MLflow: sent in order, kept on the disk while the store is away.

What was kept is sent in slices, one with each further operation: a slice has more than one, so that what waits gets
less, and training never stands still until all of it is sent.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

from mlflow.exceptions import MlflowException

from grpo_mlflow.errors import one_line
from grpo_mlflow.runtime import interrupts
from grpo_mlflow.tracking.operations import Destination, Operation
from grpo_mlflow.tracking.spool import Spool
from grpo_mlflow.tracking.store import STORE_ERRORS

_RETRY_SECONDS = 30.0
SPOOL = "spool.jsonl"
_SLICE_SECONDS, _SLICE_LEAST = 1.0, 2
_NEVER = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE")
log = logging.getLogger(__name__)


class Outbox:
    """Sends operations to a run, each once those before it are sent; those that wait are in `SPOOL`."""

    def __init__(self, destination: Destination) -> None:
        self._destination = destination
        self._spool = Spool(destination.run_dir / SPOOL)
        self._retry_at = self._pause = 0.0

    @property
    def path(self) -> Path:
        """The file of the operations that wait."""
        return self._spool.path

    def waits(self) -> bool:
        """Return whether operations wait for the store."""
        return self._spool.waits()

    def waiting(self) -> list[Operation]:
        """Return the operations that wait."""
        return list(self._spool.waiting())

    def hurry(self) -> None:
        """Try the store again at the next operation, unless a try takes minutes."""
        if self._pause <= _RETRY_SECONDS:
            self._retry_at = 0.0

    @interrupts.deferred()  # the store's client may take a signal for an error of the store, or the spool lose a line
    def send(self, operation: Operation) -> None:
        """Send the operation; while others wait, or where the store is away, keep it, and send some of these."""
        if self._spool.waits():
            self._spool.append(operation)
            self.replay(_SLICE_SECONDS)
            return
        began = time.monotonic()
        try:
            self._send_or_set_aside(operation)
        except STORE_ERRORS as error:
            self._spool.append(operation)
            self._rest(began)
            log.warning("MLflow is away, keeping its data in %s: %s", self._spool.path, one_line(error))

    @interrupts.deferred()
    def replay(self, seconds: float) -> Exception | None:
        """Send what waits, in order, until this time is over, or a signal waits; what was sent waits no more.

        Not within 30 seconds after the store was away. Returns its error if it is away.
        """
        began, sent = time.monotonic(), 0
        if began < self._retry_at:
            return None
        try:
            for operation in self._spool.waiting():
                if sent >= _SLICE_LEAST and (time.monotonic() - began >= seconds or interrupts.waits()):
                    break
                self._send_or_set_aside(operation)
                sent += 1
        except STORE_ERRORS as error:
            self._rest(began)
            return error
        finally:
            self._spool.drop(sent)
        return None

    def _rest(self, began: float) -> None:
        """Leave the store alone for a while after a try that began then."""
        self._pause = max(_RETRY_SECONDS, time.monotonic() - began)
        self._retry_at = time.monotonic() + self._pause

    def _send_or_set_aside(self, operation: Operation) -> None:
        """Send an operation; one that the store will never take must not hold up those behind it."""
        try:
            operation.send(self._destination)
        except Exception as error:  # of MLflow's own mistakes, too, training must not end
            if isinstance(error, STORE_ERRORS) and getattr(error, "error_code", None) not in _NEVER:
                raise
            if not operation.refusable:
                raise MlflowException(one_line(error)) from error
            line = operation.as_list()
            log.warning("MLflow refuses %s, kept in refused.jsonl: %s", line[0], one_line(error))
            with (self._destination.run_dir / "refused.jsonl").open("a") as stream:
                stream.write(json.dumps(line) + "\n")
