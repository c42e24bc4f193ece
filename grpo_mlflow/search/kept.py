"""What runs of a study could not send to MLflow is sent before one of them is named the winner, and at the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import optuna
from optuna.trial import TrialState

from grpo_mlflow import tracking
from grpo_mlflow.errors import StoreAway, UserError
from grpo_mlflow.runtime.console import Console
from grpo_mlflow.search import study as studies


def require_sent(study: optuna.Study, uri: str | None, parent: str, console: Console) -> None:
    """Send what the ended trials have kept on this machine, and see that none that counts has kept anything elsewhere.

    Raises:
        StoreAway: something waits still, here or on another machine.
    """
    _send(tracking.send_kept_below(uri, parent), console)
    client = tracking.connect(uri)
    for trial in studies.final_trials(study):
        run_id = trial.user_attrs.get(studies.RUN_ID)
        if trial.state != TrialState.COMPLETE or run_id is None or not tracking.lives(client, run_id):
            continue
        if (where := tracking.elsewhere(uri, run_id)) is not None:
            raise StoreAway(
                f"trial {trial.number}: the end of its run {run_id} is not in MLflow, so its files wait in {where}; "
                "allowed: the command upload there, then this one again"
            )


def send_below(uri: str | None, parent: str, console: Console) -> None:
    """Send what all runs of a study have kept on this machine; what that does not succeed with stays and is told."""
    try:
        _send(tracking.send_kept_below(uri, parent), console)
    except UserError as error:
        console.warn(str(error))


def send_own(uri: str | None, run_ids: Iterable[str], console: Console) -> None:
    """Send what runs of this process have kept; what that does not succeed with stays and is told."""
    try:
        _send((found for run_id in run_ids if (found := tracking.send_kept(uri, run_id)) is not None), console)
    except UserError as error:
        console.warn(str(error))


def _send(uploads: Iterator[tracking.Upload], console: Console) -> None:
    for each in uploads:
        if each.error:
            raise StoreAway(f"run {each.run_id}: {each.left} of its writes still wait for MLflow: {each.error}")
        console.say(f"sent what run {each.run_id} had kept while MLflow was away")
