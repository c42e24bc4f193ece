"""Operations on their way to MLflow: on the disk first, then sent in order, however long the store is away."""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path

from mlflow.exceptions import MlflowException

from grpo_mlflow.errors import one_line
from grpo_mlflow.runtime import interrupts
from grpo_mlflow.tracking.borders import STORE_ERRORS
from grpo_mlflow.tracking.operations import Destination, Operation, Publish
from grpo_mlflow.tracking.spool import Spool

_RETRY_SECONDS = 30.0
TRANSFER_SECONDS, SHORT_SECONDS = 600.0, 60.0  # for a file or folder, and for anything else
SPOOL = "spool.jsonl"
_NEVER = (
    *("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE"),
    "ENDPOINT_NOT_FOUND",  # of a server that is too old for it
)
log = logging.getLogger(__name__)


class Outbox:
    """Keeps operations for a run in `SPOOL` of its folder until `replay` has sent them.

    One thread may keep operations while another one sends them.
    """

    def __init__(self, destination: Destination) -> None:
        self._destination = destination
        self._spool = Spool(destination.run_dir / SPOOL)
        self._retry_at = self._pause = 0.0
        self._stopping = self._closed = self._transfers = False
        self._asked_at = self._failed_from = 0.0
        self._turn = threading.Lock()  # of whoever calls the store
        self._file = threading.Lock()

    @property
    def path(self) -> Path:
        """The file of the operations that wait."""
        return self._spool.path

    @property
    def is_away(self) -> bool:
        """Whether the last try has failed."""
        return self._retry_at > 0.0

    @property
    def rest(self) -> float:
        """Seconds until the store may be tried again."""
        return max(0.0, self._retry_at - time.monotonic())

    def waits(self) -> bool:
        """Return whether operations wait for the store."""
        return self._spool.waits()

    def waiting(self) -> list[Operation]:
        """Return the operations that wait."""
        with self._file:
            return list(self._spool.waiting(self._spool.end()))

    def forget_end(self) -> None:
        """Take out how the run has ended, as it goes on: sent later, that would end it in the middle."""
        with self._file:
            self._spool.keep_only(lambda each: not each.ends)

    def patience(self) -> float:
        """Return the seconds that the store has left for what it is asked, or is asked next."""
        asked_at, limit = self._asked_at, TRANSFER_SECONDS if self._transfers else SHORT_SECONDS
        return asked_at + limit - time.monotonic() if asked_at else limit

    def hurry(self, since: float) -> bool:
        """Let the store be tried again at once; return False if it has failed since, or if a try takes minutes."""
        if self.rest:
            if self._pause > _RETRY_SECONDS or self._failed_from >= since:
                return False
            self._retry_at = time.monotonic()
        return True

    @interrupts.deferred()  # or a signal cuts a line off
    def keep(self, operation: Operation) -> None:
        """Add an operation to those that wait; one that the disk does not take is sent at once.

        Raises:
            OSError: the disk does not take it, and the store cannot be reached either.
        """
        try:
            with self._file:
                self._spool.append(operation)
        except OSError:  # a full disk
            if not self._send_now(operation):
                raise

    def sync(self) -> None:
        """Let what was kept outlast a failure of the machine, too, and not only of the process."""
        with self._file:
            self._spool.sync()

    @interrupts.deferred()  # the store's client may take a signal for an error of the store, or the spool lose a line
    def replay(self, seconds: float) -> Exception | None:
        """Send what waits, in order, until this time is over, or a signal waits; what was sent waits no more.

        Not within 30 seconds after it failed. Returns the error if it does: of the store, or of the disk that holds
        what waits.
        """
        if self.rest:
            return None
        with self._turn:
            return self._replay(seconds)

    def close(self, seconds: float) -> None:
        """Send nothing more, and wait for what is being sent, for so long at most.

        What takes longer counts as not sent: others may be at the file from now on, and send it again.
        """
        self._stopping = True
        if self._turn.acquire(timeout=seconds):
            self._turn.release()
        with self._file:
            self._closed = True

    def _replay(self, seconds: float) -> Exception | None:
        began, sent, failed = time.monotonic(), 0, None
        try:
            with self._file:
                end = self._spool.end()
            for operation in self._spool.waiting(end):
                self._asked_at, self._transfers = time.monotonic(), isinstance(operation, Publish)
                if self._stopping or (sent and (self._asked_at - began >= seconds or interrupts.waits())):
                    break
                self._send_or_set_aside(operation)
                sent += 1
        except STORE_ERRORS as error:
            failed = error
        try:
            with self._file:
                if not self._closed:
                    self._spool.drop(sent)
        except OSError as error:  # it is sent again then, which changes nothing
            failed = failed or error
        asked_at, self._asked_at = self._asked_at, 0.0
        if failed is None:
            self._retry_at = 0.0
            return None
        if not self.is_away:
            log.warning("MLflow is away, keeping its data in %s: %s", self._spool.path, one_line(failed))
        self._failed_from = asked_at or began
        self._pause = max(_RETRY_SECONDS, time.monotonic() - self._failed_from)
        self._retry_at = time.monotonic() + self._pause
        return failed

    def _send_now(self, operation: Operation) -> bool:
        """Send an operation after those that wait; return whether that was possible."""
        if not self._turn.acquire(timeout=_RETRY_SECONDS):
            return False
        try:
            while self.waits():
                if self._stopping or self._replay(_RETRY_SECONDS) is not None or interrupts.waits():
                    return False
            self._send_or_set_aside(operation)
        except STORE_ERRORS:
            return False
        finally:
            self._turn.release()
        return True

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
