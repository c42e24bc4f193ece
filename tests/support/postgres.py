"""A PostgreSQL server of the tests' own, on this machine only."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy

PASSWORD = "only-for-tests"
_START_SECONDS = 30.0
# The input ends with the tests, however they end: a killed test run leaves no server. INT ends the connections, too.
_UNTIL_END_OF_INPUT = '"$@" & cat; kill -INT $!; wait'


class Server:
    """A running server; its databases are made by `database`."""

    def __init__(self, address: str, port: int) -> None:
        self._address, self._port, self._made = address, port, 0

    def url(self, database: str) -> str:
        return f"postgresql://grpo:{PASSWORD}@{self._address}:{self._port}/{database}"

    def database(self) -> str:
        """Make a new database and return its address."""
        self._made += 1
        name = f"study_{self._made}"
        self._execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def wait(self, process: subprocess.Popen[bytes], log: Path) -> None:
        """Wait until it answers."""
        end = time.monotonic() + _START_SECONDS
        while True:
            try:
                return self._execute("SELECT 1")
            except sqlalchemy.exc.OperationalError:
                if process.poll() is not None or time.monotonic() > end:
                    pytest.skip(f"PostgreSQL does not start here: {log.read_text()[-500:]}")
                time.sleep(0.1)

    def _execute(self, statement: str) -> None:
        url = self.url("postgres").replace("postgresql://", "postgresql+psycopg://")
        engine = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sqlalchemy.NullPool)
        with engine.connect() as connection:
            connection.exec_driver_sql(statement)


@contextmanager
def server(address: str = "127.0.0.1") -> Iterator[Server]:
    """Run a server at an address of this machine until the block ends.

    The test is skipped where PostgreSQL or its driver is not installed.
    """
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("psycopg is not installed")
    initdb, postgres = _program("initdb"), _program("postgres")
    as_user = _unprivileged()
    # Not below pytest's own folder: only its owner may enter that, and the server may be another user.
    with tempfile.TemporaryDirectory(prefix="grpo-postgres-") as name:
        folder = Path(name)
        data, password, log = folder / "data", folder / "password", folder / "log"
        password.write_text(PASSWORD)
        if as_user:
            shutil.chown(folder, as_user["user"], as_user["group"])
            shutil.chown(password, as_user["user"], as_user["group"])
        subprocess.run(
            [initdb, "-D", data, "-U", "grpo", "-A", "scram-sha-256", f"--pwfile={password}", "-E", "UTF8", "-N"],
            cwd=folder,
            check=True,
            capture_output=True,
            **as_user,
        )
        with (data / "pg_hba.conf").open("a") as access:
            access.write(f"host all all {address}/24 scram-sha-256\n")
        port = _free_port(address)
        settings = [f"listen_addresses={address}", "unix_socket_directories=", "fsync=off", f"port={port}"]
        words = [postgres, "-D", str(data), *(word for setting in settings for word in ("-c", setting))]
        with log.open("wb") as stream:
            process = subprocess.Popen(
                ["/bin/sh", "-c", _UNTIL_END_OF_INPUT, "sh", *words],
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=stream,
                **as_user,
            )
        try:
            found = Server(address, port)
            found.wait(process, log)
            yield found
        finally:
            process.communicate(timeout=30)


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        places = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
        if not places:
            pytest.skip(f"PostgreSQL is not installed: no {name}")
        found = str(places[-1])
    return found


def _unprivileged() -> dict[str, Any]:
    """Return who is to run the server, as options of subprocess: PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            user = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    pytest.skip("PostgreSQL refuses to run as root, and there is no other user")


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])
