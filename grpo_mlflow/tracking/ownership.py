"""Which process works on a run: only one may, or two would log every point and write every checkpoint.

It is a tag of the run, so that it holds wherever the other process was started, and it is signed again every 20
seconds. Who has ended holds nothing. Several that take a run at once each leave a claim first and then look for those
of others: of two, at least one sees the other's.
"""

from __future__ import annotations

import json
import logging
import random
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import mlflow
from mlflow.entities import Run

from grpo_mlflow.errors import UserError
from grpo_mlflow.runtime import owners
from grpo_mlflow.tracking.borders import STORE_ERRORS
from grpo_mlflow.tracking.store import connect, find_run

_OWNER, _CLAIM = "grpo.owner", "grpo.claim."
_TRIES = 5  # of two that claim at once, each makes way for the other
log = logging.getLogger(__name__)


def signature() -> dict[str, str]:
    """Return the tag by which this process holds a run."""
    return {_OWNER: json.dumps(owners.me())}


def sign(client: mlflow.MlflowClient, run_id: str) -> None:
    """Hold a run that nobody else can want."""
    client.set_tag(run_id, _OWNER, signature()[_OWNER])


def require_free(uri: str | None, run_id: str) -> None:
    """Return when no living process works on a run.

    Of a process of another machine only its signs of life are known: it is waited for the next one, or until it is
    given up after 3 minutes.

    Raises:
        UserError: another process works on it, or there is no such run.
        StoreAway: the store cannot be reached.
    """
    client, seen = connect(uri), None
    while (owner := _other(find_run(client, run_id).data.tags)) is not None:
        if not owners.elsewhere(owner) or seen not in (None, owner["seen"]):
            raise UserError(_refusal(run_id, owner))
        if seen is None:
            log.warning("run %s: waiting whether %s still works on it, up to 3 minutes", run_id, owners.named(owner))
        seen = owner["seen"]
        time.sleep(1.0)


def take(client: mlflow.MlflowClient, run_id: str) -> Run:
    """Hold a run from now on, and return it.

    Raises:
        UserError: another process does.
        Exception: the store is away, or has no such run, as MLflow's client says.
    """
    for _ in range(_TRIES):
        run = client.get_run(run_id)
        if (owner := _other(run.data.tags)) is not None:
            raise UserError(_refusal(run_id, owner))
        claim, mine = f"{_CLAIM}{uuid.uuid4().hex[:8]}", signature()[_OWNER]
        client.set_tag(run_id, claim, mine)
        tags = client.get_run(run_id).data.tags
        rivals = [key for key in tags if key.startswith(_CLAIM) and key != claim and _other({_OWNER: tags[key]})]
        if not rivals and _other(tags) is None:
            client.set_tag(run_id, _OWNER, mine)
        for key in tags:  # the claims of the dead, too
            if key.startswith(_CLAIM) and key not in rivals:
                with suppress(*STORE_ERRORS):  # another has removed it
                    client.delete_tag(run_id, key)
        if not rivals and _other(tags) is None:
            return run
        time.sleep(random.uniform(0.1, 1.0))
    raise UserError(_refusal(run_id, _other({_OWNER: tags[rivals[0]]}) if rivals else None))


def release(client: mlflow.MlflowClient, run_id: str) -> None:
    """Hold a run no longer."""
    with suppress(*STORE_ERRORS):  # then it is free when this process has ended
        client.delete_tag(run_id, _OWNER)


class Holding:
    """Signs a run again and again until its end."""

    def __init__(self, client: mlflow.MlflowClient, run_id: str) -> None:
        self._client, self._run_id = client, run_id
        self.lost = self._ended = False
        self._life = owners.Life(lambda _: self._renew(), logging.DEBUG)

    def require(self) -> None:
        """Raise UserError if another process took this one for dead and has the run now."""
        if self.lost:
            raise UserError(f"run {self._run_id}: another process has it; this one gave no sign of life for too long")

    def end(self) -> None:
        """Sign no more, and let others have the run at once, not only when this process ends."""
        self._ended = True
        self._life.end(wait=False)
        if not self.lost:
            release(self._client, self._run_id)

    def _renew(self) -> None:
        taken = _other(self._client.get_run(self._run_id).data.tags) is not None
        if self._ended:
            return
        if not taken:
            sign(self._client, self._run_id)
        else:
            self.lost = True
            self._life.end(wait=False)


def _other(tags: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the living process that a tag names; None if it is this one, dead, or none."""
    try:
        owner: dict[str, Any] = json.loads(tags.get(_OWNER, ""))
        return None if owners.is_me(owner) or owners.gone(owner) else owner
    except (ValueError, TypeError, KeyError):  # none of ours
        return None


def _refusal(run_id: str, owner: Mapping[str, Any] | None) -> str:
    who = owners.named(owner) if owner else "another process"
    return f"run {run_id}: {who} works on it; allowed: to resume it when that one has ended, or a new run"
