"""What people ask of a run while it goes on: its tag `grpo.command`, set in the MLflow UI or by any client."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable

import mlflow
from sqlalchemy import column, create_engine, select, table
from sqlalchemy.engine import make_url

from grpo_mlflow.errors import one_line
from grpo_mlflow.tracking import borders
from grpo_mlflow.tracking.places import COMMAND

# A row of sqlite is read in a fraction of a millisecond; a server sends the whole run, in some ten of them.
_OF_SQLITE, _OF_OTHERS = 0.1, 0.5  # seconds between two looks
_LONGEST = 30.0  # between two looks at a store that is away
_LAST = 0.5  # for the look that is under way at the end: a process forked in it would inherit a locked database
log = logging.getLogger(__name__)


class Commands:
    """Looks at the tag of a run in a thread of its own: no call to a store holds up training.

    Args:
        answered: a command whose answer the store may not have yet, so that it still shows there.
    """

    def __init__(self, client: mlflow.MlflowClient, run_id: str, answered: str = "") -> None:
        uri = mlflow.get_tracking_uri()
        read = _row(uri, run_id) if borders.is_database(uri) else _tag(client, run_id)
        pause = _OF_SQLITE if uri.startswith("sqlite") else _OF_OTHERS
        self._seen, self._answered = "", answered
        self._ended = threading.Event()
        # By a weak reference: who forgets to end this has no thread that looks for ever.
        looking = (weakref.ref(self), self._ended, read, pause)
        self._thread = threading.Thread(target=_look, args=looking, name="mlflow-commands", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> str:
        """The command that was not answered yet; empty without one."""
        seen = self._seen
        return "" if seen == self._answered else seen

    def answered(self, command: str) -> None:
        """Take no note of the command until the store shows another one, or none."""
        self._answered = command

    def end(self) -> None:
        """Look no more; a look at a store that is away is not waited for."""
        self._ended.set()
        self._thread.join(_LAST)

    def note(self, seen: str) -> None:
        """Take note of what the store shows."""
        self._seen = seen
        if seen != self._answered:
            self._answered = ""  # the answer has arrived, so the same may be asked again


def _look(by: weakref.ref[Commands], ended: threading.Event, read: Callable[[], str], pause: float) -> None:
    wait = pause
    while not ended.wait(wait):
        try:
            seen, wait = read(), pause
        except Exception as error:  # a store may be away or locked for a while: then nobody asks anything
            log.debug("no look at %s: %s", COMMAND, one_line(error))
            seen, wait = None, min(2 * wait, _LONGEST)
        if (commands := by()) is None:
            return
        if seen is not None:
            commands.note(seen)
        del commands  # or it would live as long as this


def _row(uri: str, run_id: str) -> Callable[[], str]:
    """Return a function that reads the tag where MLflow keeps it: its client would read the whole run."""
    waits = {"timeout": 0} if make_url(uri).get_backend_name() == "sqlite" else {}
    engine = create_engine(uri, connect_args=waits, pool_size=1)
    tags = table("tags", column("run_uuid"), column("key"), column("value"))  # `key` is quoted where it is reserved
    asked = select(tags.c.value).where(tags.c.run_uuid == run_id, tags.c.key == COMMAND)

    def read() -> str:
        with engine.connect() as connection:
            found = connection.execute(asked).scalar()
        return str(found or "").strip()

    return read


def _tag(client: mlflow.MlflowClient, run_id: str) -> Callable[[], str]:
    return lambda: str(client.get_run(run_id).data.tags.get(COMMAND, "")).strip()
