"""Where studies are kept: sqlite on one machine, PostgreSQL for several, or a journal file."""

from __future__ import annotations

import os
import sqlite3
import time
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from grpo_mlflow.errors import ConfigError, StoreAway, UserError, one_line, redact
from grpo_mlflow.runtime import interrupts

_ALLOWED = "sqlite:///FILE, postgresql://USER:PASSWORD@HOST/DATABASE, journal:FILE"
_ATTEMPTS = 4


def open_existing(url: str | None, tracking_uri: str | None = None) -> BaseStorage:
    """Open a storage as `open_storage` does, but make no new one.

    Raises:
        UserError: there is none, or it cannot be opened.
    """
    named = url or _default(tracking_uri)
    for scheme in ("sqlite:///", "journal:"):
        if named.startswith(scheme) and not Path(named.removeprefix(scheme)).expanduser().exists():
            raise UserError(f"search.storage = {redact(named)!r}: there is no such file; allowed: the study's storage")
    return open_storage(url, tracking_uri)


def open_storage(url: str | None, tracking_uri: str | None = None) -> BaseStorage:
    """Open the storage at `url`, by default optuna.db beside the MLflow store's file, else in the current folder.

    Where signals are handled none arrives inside a call to it. A call that fails because it is away raises StoreAway.

    Raises:
        ConfigError: it is not an address of a storage.
        UserError: it cannot be opened.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # what fails is said below, in one line
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    url = url or _default(tracking_uri)
    where = f"search.storage = {redact(url)!r}"
    if url.startswith("journal:"):
        return _guarded(_open_journal(Path(url.removeprefix("journal:")).expanduser(), where), where)
    return _guarded(get_storage(_open_database(url, where)), where)


def _guarded(storage: BaseStorage, where: str) -> BaseStorage:
    """Let signals wait for the end of a call, and tell a storage that is away by an error of ours.

    An exception that arrives inside leaves a session that refuses whatever comes next, or a locked database, and then
    the trial that it stopped cannot be put back.
    """

    def guard(call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            with interrupts.deferred():
                try:
                    return call(*args, **kwargs)
                except (StorageInternalError, DBAPIError, OSError) as error:
                    raise StoreAway(f"{where}: {one_line(error.__cause__ or error)}") from error

        return guarded

    for name in vars(BaseStorage):
        if not name.startswith("_"):
            setattr(storage, name, guard(getattr(storage, name)))
    return storage


def _open_database(url: str, where: str) -> RDBStorage:
    try:
        made = make_url(url)
        made.get_dialect()
    except (ArgumentError, ValueError):
        raise ConfigError(f"{where}: not an address of a storage; allowed: {_ALLOWED}") from None
    if made.drivername == "postgresql":  # which driver that means differs between versions of SQLAlchemy
        made = made.set(drivername="postgresql+psycopg")
    sqlite = made.get_backend_name() == "sqlite"
    options: dict[str, Any] = {"connect_args": {"timeout": 60.0}} if sqlite else {"pool_pre_ping": True}
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            storage = RDBStorage(made.render_as_string(hide_password=False), engine_kwargs=options)
            if sqlite:
                _lock_at_begin(storage.engine)
            return storage
        except DBAPIError as error:
            # Two processes may make the tables of a new database at once: the slower one finds them a moment later.
            if attempt == _ATTEMPTS:
                raise UserError(f"{where}: {one_line(error.orig or error)}") from error
            time.sleep(0.3 * attempt)
        except ImportError as error:
            driver = made.get_backend_name()
            extra = "pip install -e '.[postgresql]' in the project's folder"
            hint = extra if driver == "postgresql" else f"a driver for {driver}"
            raise UserError(f"{where}: {one_line(error)}; needed: {hint}") from error
        except Exception as error:  # a version of the tables that Optuna does not know, and such
            raise UserError(f"{where}: {one_line(error)}") from error
    raise AssertionError("unreachable")


def _lock_at_begin(engine: Engine) -> None:
    """Make every transaction take the database's lock as it begins.

    Optuna takes a waiting trial by reading its state and then writing it, which is safe where the database locks rows.
    sqlite has no such lock, and its driver begins a transaction only at the first write: two processes would both
    read, and both take the trial.
    """

    def connected(connection: sqlite3.Connection, record: object) -> None:
        connection.isolation_level = None  # the driver begins nothing by itself

    def begun(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    event.listen(engine, "connect", connected)
    event.listen(engine, "begin", begun)
    engine.dispose()  # connections from before


def _default(tracking_uri: str | None) -> str:
    return f"sqlite:///{_folder(tracking_uri) / 'optuna.db'}"


def _folder(tracking_uri: str | None) -> Path:
    """Return where the runs of a study are: a study and its runs belong together."""
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    return Path(uri.removeprefix("sqlite:///") if uri.startswith("sqlite:///") else "mlflow.db").absolute().parent


def _open_journal(path: Path, where: str) -> JournalStorage:
    if not path.name:
        raise ConfigError(f"{where}: names no file; allowed: {_ALLOWED}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(str(path.absolute())))
    except Exception as error:  # no right to write there, or a file that is no journal
        raise UserError(f"{where}: {one_line(error)}") from error
