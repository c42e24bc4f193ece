"""What only one of the processes that work on a study may do: to lead it (own the parent run, end it), to queue
trials, to put back those whose process is gone.

Such a right is a companion study in the same storage, since a storage lets a name exist once. It is named by role and
generation: who creates the next generation after one whose owner is gone has taken it over, and only one can. (To
delete the old one and create the same anew would not do: between the two, another may have done both.)
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from optuna.exceptions import DuplicatedStudyError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection

from grpo_mlflow.errors import UserError
from grpo_mlflow.runtime import owners

LEADER, QUEUER, REVIVER = "leader", "queuer", "reviver"
_OWNER, _PARENT = "owner", "parent_run_id"
_UNSIGNED = 20.0  # seconds that a right may stand before its owner has signed it


def is_companion(name: str) -> bool:
    """Return whether a study only stands for a right, and holds no trials."""
    return re.search(rf" \(({LEADER}|{QUEUER}|{REVIVER}) \d+\)$", name) is not None


def _held(storage: BaseStorage, name: str, role: str) -> dict[int, dict[str, Any]]:
    """Return the attributes of every generation that stands, newest first."""
    pattern = re.compile(re.escape(f"{name} ({role} ") + r"(\d+)\)")
    found = {}
    for study in storage.get_all_studies():
        if match := pattern.fullmatch(study.study_name):
            found[int(match[1])] = study.user_attrs
    return dict(sorted(found.items(), reverse=True))


class Right:
    """The right to a role in a study."""

    def __init__(self, storage: BaseStorage, name: str, role: str, generation: int) -> None:
        self._storage, self._name, self._role, self._generation = storage, name, role, generation
        self._id = storage.get_study_id_from_name(_companion(name, role, generation))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Show that this process has the right, until the block ends; then give it up."""
        try:
            with owners.showing_life(lambda owner: self._note(_OWNER, owner)):
                yield
        finally:
            self.give_up()

    def announce(self, parent_run_id: str) -> None:
        """Tell those who join which run is the parent."""
        self._note(_PARENT, parent_run_id)

    def require(self) -> None:
        """Raise UserError if another process took this one for dead and has the right now."""
        newest = next(iter(_held(self._storage, self._name, self._role)), None)
        if newest != self._generation:
            raise UserError(
                f"study {self._name!r}: another became its {self._role} while this one gave no sign of life"
            )

    def give_up(self) -> None:
        _delete(self._storage, self._name, self._role, self._generation)

    def _note(self, key: str, value: Any) -> None:
        self._storage.set_study_user_attr(self._id, key, value)


def _companion(name: str, role: str, generation: int) -> str:
    return f"{name} ({role} {generation})"


def _delete(storage: BaseStorage, name: str, role: str, generation: int) -> None:
    with suppress(KeyError):  # somebody else has cleaned up
        storage.delete_study(storage.get_study_id_from_name(_companion(name, role, generation)))


def take(storage: BaseStorage, name: str, role: str = LEADER) -> Right | None:
    """Take the right to a role in the study; None if a living process has it."""
    unsigned_since: dict[int, float] = {}
    while True:
        held = _held(storage, name, role)
        for generation, attributes in held.items():
            since = unsigned_since.setdefault(generation, time.monotonic())
            owner = attributes.get(_OWNER)
            if owner is not None and not owners.gone(owner):
                return None
            if owner is None and time.monotonic() - since < _UNSIGNED:
                break  # its owner is about to sign it
        else:
            if right := _create(storage, name, role, max(held, default=-1) + 1, list(held)):
                return right
        time.sleep(random.uniform(0.05, 0.2))


def _create(storage: BaseStorage, name: str, role: str, generation: int, dead: list[int]) -> Right | None:
    """Create a generation; None if another process was faster. Clean up the dead ones before it."""
    try:
        storage.create_new_study([StudyDirection.MAXIMIZE], _companion(name, role, generation))
    except DuplicatedStudyError:
        return None
    right = Right(storage, name, role, generation)
    for old in dead:
        _delete(storage, name, role, old)
    # What was dead may have been taken over, given up and begun anew since it was seen: then there are two, and both
    # step back.
    if set(_held(storage, name, role)) != {generation}:
        right.give_up()
        return None
    right._note(_OWNER, owners.me())
    return right


def parent_of(storage: BaseStorage, name: str) -> str | None:
    """Wait until the leader has announced the parent run and return it; None if the leader ended before."""
    since = time.monotonic()
    while True:
        held = _held(storage, name, LEADER)
        if not held:
            return None
        attributes = next(iter(held.values()))
        if parent := attributes.get(_PARENT):
            return str(parent)
        owner = attributes.get(_OWNER)
        if owners.gone(owner) if owner else time.monotonic() - since > _UNSIGNED:
            return None
        time.sleep(0.3)
