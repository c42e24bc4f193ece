"""What judges have answered, on disk by content: neither a resumed nor a replayed run asks a question again."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from grpo_mlflow.errors import UserError, one_line

_TABLE = "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, score REAL NOT NULL, text TEXT NOT NULL)"


class Answers:
    """A file of scores by key, which several processes may use at once."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "answers.sqlite"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # without the wait, a process that finds the file locked would fail at once
            self._connection = sqlite3.connect(self.path, timeout=60.0, isolation_level=None, check_same_thread=False)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=NORMAL")  # else each answer waits for the disk
            self._connection.execute(_TABLE)
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from error

    def get(self, key: str) -> float | None:
        """Return the score of this key, or None.

        Raises:
            UserError: the file cannot be read.
        """
        try:
            with closing(self._connection.execute("SELECT score FROM answers WHERE key = ?", (key,))) as found:
                row = found.fetchone()
        except sqlite3.Error as error:
            raise self._unusable(error) from error
        return None if row is None else float(row[0])

    def put(self, key: str, score: float, text: str) -> None:
        """Keep a score and the answer that it was read from.

        Raises:
            UserError: the file cannot be written.
        """
        try:
            self._connection.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", (key, score, text))
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def close(self) -> None:
        self._connection.close()

    def _unusable(self, error: Exception) -> UserError:
        return UserError(f"the answers of judges in {self.path} cannot be used: {one_line(error)}; allowed: delete it")
