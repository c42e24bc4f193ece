"""The models of a run, loaded before it is opened: one that is refused leaves no run behind."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from grpo_mlflow import tasks
from grpo_mlflow.config import Config
from grpo_mlflow.model import loading
from grpo_mlflow.model.policy import Policy, choose_device
from grpo_mlflow.runs import messages, preflight, self_check
from grpo_mlflow.runtime import interrupts
from grpo_mlflow.runtime.console import Console
from grpo_mlflow.runtime.processes import Processes
from grpo_mlflow.training.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Models:
    """The model that is trained, its reference (None without KL), and where the first was loaded from.

    `initial` returns where the model before training is loaded from.
    """

    actor: Policy
    reference: Policy | None
    source: str | Path
    initial: Callable[[], str | Path]


def load(config: Config, checkpoint: Checkpoint | None, processes: Processes, console: Console) -> Models:
    """Load the models of a training run, from the beginning or from a checkpoint, in all its processes.

    Raises:
        ModelError: one of them cannot be used.
        ConfigError: what the settings ask for does not go with them.
    """
    start = time.perf_counter()

    def initial() -> str | Path:
        return loading.model_source(config.model.train_id, config, messages.warmup_progress(console))

    source = checkpoint.path if checkpoint else processes.one_after_first(initial)
    device = processes.accelerator.device
    actor = processes.one_after_first(lambda: loading.trained(config, source, device))
    if config.generation.backend != "local":  # what a server samples is priced as the server does
        actor = replace(actor, sampled=None)
    most = _prove(config, actor, processes, console)
    reference = processes.one_after_first(lambda: loading.reference(config, actor, initial))
    if reference is not None and reference.model is not actor.model:
        reference = replace(reference, sampled=actor.sampled)
        processes.one_after_first(lambda: self_check.prove(reference, most))
    console.say(messages.introduce(config, actor, time.perf_counter() - start))
    return Models(actor, reference, source, initial)


def load_measured(
    config: Config, source: str | Path, processes: Processes, console: Console
) -> tuple[Policy, str | Path]:
    """Load the model of an evaluation, in all its processes; return it, and what it was loaded from.

    Args:
        source: a folder or hub id; empty: `model.train_id`.

    Raises:
        ModelError: it cannot be used.
        ConfigError: what the settings ask for does not go with it.
    """
    if not source:
        report = messages.warmup_progress(console)
        source = processes.one_after_first(lambda: loading.model_source(config.model.train_id, config, report))
    device = processes.accelerator.device
    found = processes.one_after_first(lambda: loading.measured(config, source, device))
    _prove(config, found, processes, console, trains=False)
    return found, source


def _prove(config: Config, actor: Policy, processes: Processes, console: Console, *, trains: bool = True) -> int:
    """Let the model meet the task and prove its ways; return the most tokens that a row will have."""
    task = tasks.of(config)
    most = processes.one_after_first(lambda: preflight.require(config, task, actor, trains=trains))
    processes.one_after_first(lambda: self_check.prove(actor, most))
    for line in (messages.sampled_how(config, actor), preflight.idle_arguments(config, task, actor)):
        if line:
            console.say(line)
    return most


def require(config: Config, console: Console) -> None:
    """Load the models of a training run and let them go, before anything is made that could only fail with them.

    Raises:
        ModelError: one of them cannot be used.
        ConfigError: what the settings ask for does not go with them.
    """
    with interrupts.handled():
        source = loading.model_source(config.model.train_id, config, messages.warmup_progress(console))
        actor = loading.trained(config, source, choose_device(config.model.device))
        self_check.prove(actor, preflight.require(config, tasks.of(config), actor))
        loading.reference(config, actor, lambda: source)
