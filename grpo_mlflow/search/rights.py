"""What only one of the processes that work on a study may do: to lead it (own the parent run, end it), to queue trials.

Such a right is a companion study in the same storage, which makes its name exist at most once: who creates it has the
right, and deletes it at the end. One whose owner is gone is deleted by whoever meets it.
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

LEADER, QUEUER = "leader", "queuer"
_OWNER, _PARENT = "owner", "parent_run_id"
_UNSIGNED = 20.0  # seconds that a right may stand before its owner has signed it


def _companion(name: str, role: str) -> str:
    return f"{name} ({role})"


class Right:
    """The right to a role in a study."""

    def __init__(self, storage: BaseStorage, study_id: int, name: str, role: str) -> None:
        self._storage, self._id, self._name, self._role = storage, study_id, name, role

    @contextmanager
    def held(self) -> Iterator[None]:
        """Show that this process has the right, until the block ends; then give it up."""
        try:
            with owners.showing_life(lambda owner: self._note(_OWNER, owner)):
                yield
        finally:
            if self._is_ours():
                self._storage.delete_study(self._id)

    def announce(self, parent_run_id: str) -> None:
        """Tell those who join which run is the parent."""
        self._note(_PARENT, parent_run_id)

    def require(self) -> None:
        """Raise UserError if another process took this one for dead and has the right now."""
        if not self._is_ours():
            raise UserError(
                f"study {self._name!r}: another became its {self._role} while this one gave no sign of life"
            )

    def _note(self, key: str, value: Any) -> None:
        self._storage.set_study_user_attr(self._id, key, value)

    def _is_ours(self) -> bool:
        try:
            return self._storage.get_study_id_from_name(_companion(self._name, self._role)) == self._id
        except KeyError:
            return False


def take(storage: BaseStorage, name: str, role: str = LEADER) -> Right | None:
    """Take the right to a role in the study; None if a living process has it."""
    companion = _companion(name, role)
    unsigned_since = time.monotonic()
    while True:
        try:
            return Right(storage, storage.create_new_study([StudyDirection.MAXIMIZE], companion), name, role)
        except DuplicatedStudyError:
            pass
        try:
            found = storage.get_study_id_from_name(companion)
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
            attributes = storage.get_study_user_attrs(storage.get_study_id_from_name(_companion(name, LEADER)))
        except KeyError:
            return None
        if parent := attributes.get(_PARENT):
            return str(parent)
        if (owner := attributes.get(_OWNER)) is not None and owners.gone(owner):
            return None
        time.sleep(0.3)
