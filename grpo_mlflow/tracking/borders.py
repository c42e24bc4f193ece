"""What a store may be or do: the one place that knows the exceptions of MLflow, of its databases and its servers."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from urllib.parse import urlsplit

import requests
from mlflow.exceptions import MlflowException
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from grpo_mlflow.errors import ConfigError, StoreAway, UserError, one_line, redact

STORE_ERRORS = (MlflowException, requests.exceptions.RequestException, SQLAlchemyError, OSError)
logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # what is tried again, we tell ourselves
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # else a traceback beside each line of ours
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_ALLOWED = "allowed: sqlite:///FILE, http://HOST:PORT, postgresql://USER:PASSWORD@HOST/DATABASE"
_SECONDS = 5
_LONGEST = 100  # characters of a folder's name


def require_address(uri: str) -> None:
    """Refuse what is no address at all, which MLflow finds out in the middle of a call, if ever.

    Raises:
        ConfigError: the line says what is allowed.
    """
    try:
        _ = urlsplit(uri).port if uri.startswith(("http://", "https://")) else None
        if is_database(uri):
            make_url(uri)
    except (ValueError, ArgumentError) as error:
        raise ConfigError(f"tracking.uri = {redact(uri)!r}: not an address ({one_line(error)}); {_ALLOWED}") from None


def require_database(uri: str) -> None:
    """Ask a database once before MLflow does, which would ask ten times, for 100 seconds, each with a warning.

    Raises:
        StoreAway: it does not answer.
        UserError: the driver for it is missing.
    """
    if not is_database(uri):
        return
    where = f"MLflow store {redact(uri)}"
    url = make_url(uri)
    kind, path = url.get_backend_name(), Path(url.database or "")
    if kind == "sqlite" and not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)  # MLflow makes another one where the name has a `%20`
        except OSError as error:
            raise UserError(f"tracking.uri = {redact(uri)!r}: {one_line(error)}") from error
        return
    waits = {"sqlite": "timeout", "postgresql": "connect_timeout", "mysql": "connect_timeout"}
    asked = "SELECT count(*) FROM sqlite_master" if kind == "sqlite" else "SELECT 1"
    try:
        options = {waits[kind]: _SECONDS} if kind in waits else {}
        with create_engine(url, poolclass=NullPool, connect_args=options).connect() as connection:
            connection.execute(text(asked))
    except ImportError as error:
        hint = "postgresql+psycopg://..., or psycopg2" if kind == "postgresql" else "the driver"
        raise UserError(f"{where}: {one_line(error)}; needed: {hint}") from error
    except SQLAlchemyError as error:
        raise StoreAway(f"{where}: {one_line(getattr(error, 'orig', None) or error)}") from error


def unusable(uri: str, error: Exception) -> UserError:
    """Return what MLflow raised for an address as an error of ours."""
    kind = ConfigError if getattr(error, "error_code", None) == "INVALID_PARAMETER_VALUE" else UserError
    return kind(f"tracking.uri = {redact(uri)!r}: {one_line(error)}")


def refusal(experiment: str, error: MlflowException) -> Exception:
    """Return an error of ours for a name that MLflow takes for no experiment, and else what it raised."""
    refused = error.error_code == "INVALID_PARAMETER_VALUE"
    other: Exception = error
    return ConfigError(f"tracking.experiment = {experiment[:60]!r}: {one_line(error)}") if refused else other


def is_database(uri: str) -> bool:
    return uri.split(":", 1)[0].split("+", 1)[0] in _DATABASES


def artifact_folder(uri: str, experiment: str) -> str | None:
    """Return where the artifacts of a new experiment of an sqlite store go: beside the database, whatever its name.

    None for other stores, which have a place of their own. A name may look like a path (Databricks takes no other);
    one from the root, or that goes up, must not lead out of the store's folder, and no file system takes a long one.
    """
    if not uri.startswith("sqlite:///"):
        return None
    parts = [re.sub(r"[\x00-\x1f]", "_", part)[:_LONGEST] for part in experiment.split("/")]
    folder = Path(make_url(uri).database or "").parent / "mlruns"
    return str(folder.joinpath(*(part for part in parts if part not in ("", ".", ".."))))
