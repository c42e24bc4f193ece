"""What a run does when it is asked to by the tag `grpo.command` in MLflow: `save`, `stop`, and a trial `prune`."""

from __future__ import annotations

import signal
from collections.abc import Callable

from grpo_mlflow.errors import Pruned
from grpo_mlflow.runtime import interrupts
from grpo_mlflow.runtime.console import Console
from grpo_mlflow.tracking import Tracker
from grpo_mlflow.training import checkpoint
from grpo_mlflow.training.parts import Parts


def answer_with(tracker: Tracker, console: Console, command: str, answer: str) -> None:
    """Say what becomes of a command, here and in MLflow."""
    console.say(f"asked by MLflow: {command}: {answer}")
    tracker.answer(command, f"{command}: {answer}")


def obey(parts: Parts, version: int, save: Callable[[], None], *, is_trial: bool) -> None:
    """Do what the tag asks, if anything, in all processes of the run; `save` writes a checkpoint of `version`.

    Raises:
        Interrupted: it asks to stop, as Ctrl-C does.
        Pruned: it asks to end a trial of a study here.
    """
    tracker = parts.tracker
    command = parts.processes.broadcast(tracker.command())
    if not command:
        return
    allowed = ["save", "stop", "prune"] if is_trial else ["save", "stop"]
    asked = command.lower()
    if asked == "save" and version > 0:
        save()
        answer = f"saved {checkpoint.name_of(version)}"
    elif asked == "save":
        answer = "nothing to save before the first iteration"
    elif asked in allowed:
        answer = f"ended at iteration {version}"
    else:
        answer = f"not done; allowed: {', '.join(allowed)}"
    answer_with(tracker, parts.console, command, answer)
    if asked in allowed and asked != "save":
        if asked == "prune":
            raise Pruned(f"at iteration {version}, as asked")
        interrupts.stop(signal.SIGINT)
