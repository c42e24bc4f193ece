"""Of the commands that work on one study, one leads: it owns the parent run, fills the queue and ends the study.

The right to lead is a companion study in the same storage, which makes its name exist at most once: who creates it
leads, and deletes it at the end. One whose owner is gone is deleted by whoever meets it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from optuna.exceptions import DuplicatedStudyError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection

from grpo_mlflow.errors import UserError
from grpo_mlflow.search import owners

_OWNER, _PARENT = "owner", "parent_run_id"
_UNSIGNED = 20.0  # seconds that a right may stand before its owner has signed it


def _companion(name: str) -> str:
    return f"{name} (leader)"


class Lead:
    """The right to lead a study."""

    def __init__(self, storage: BaseStorage, study_id: int, name: str) -> None:
        self._storage, self._id, self._name = storage, study_id, name

    @contextmanager
    def held(self) -> Iterator[None]:
        """Show that this process leads, until the block ends."""
        try:
            with owners.showing_life(lambda owner: self._note(_OWNER, owner)):
                yield
        finally:
            if self._is_ours():
                self._storage.delete_study(self._id)

    def announce(self, parent_run_id: str) -> None:
        """Tell those who join that the queue is full and which run is the parent."""
        self._note(_PARENT, parent_run_id)

    def require(self) -> None:
        """Raise UserError if another command took this one for dead and leads now."""
        if not self._is_ours():
            raise UserError(f"study {self._name!r}: another command took the lead while this one gave no sign of life")

    def _note(self, key: str, value: Any) -> None:
        self._storage.set_study_user_attr(self._id, key, value)

    def _is_ours(self) -> bool:
        try:
            return self._storage.get_study_id_from_name(_companion(self._name)) == self._id
        except KeyError:
            return False


def take(storage: BaseStorage, name: str) -> Lead | None:
    """Take the right to lead the study; None if a living process has it."""
    unsigned_since = time.monotonic()
    while True:
        try:
            return Lead(storage, storage.create_new_study([StudyDirection.MAXIMIZE], _companion(name)), name)
        except DuplicatedStudyError:
            pass
        try:
            found = storage.get_study_id_from_name(_companion(name))
            owner = storage.get_study_user_attrs(found).get(_OWNER)
            if owner is not None and not owners.gone(owner):
                return None
            if owner is None and time.monotonic() - unsigned_since < _UNSIGNED:
                time.sleep(0.2)
                continue
            storage.delete_study(found)
        except KeyError:  # deleted by its owner, or by another that met it
            continue


def parent_of(storage: BaseStorage, name: str) -> str | None:
    """Wait until the leader has announced the parent run and return it; None if the leader ended before."""
    while True:
        try:
            attributes = storage.get_study_user_attrs(storage.get_study_id_from_name(_companion(name)))
        except KeyError:
            return None
        if parent := attributes.get(_PARENT):
            return str(parent)
        if (owner := attributes.get(_OWNER)) is not None and owners.gone(owner):
            return None
        time.sleep(0.3)
