"""The models of a run, loaded before it is opened: one that is refused leaves no run behind."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from grpo_mlflow import tasks
from grpo_mlflow.config import Config
from grpo_mlflow.model import loading
from grpo_mlflow.model.devices import choose_device
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.runs import messages, preflight, self_check, spreading
from grpo_mlflow.runs.spreading import Turn
from grpo_mlflow.runtime import interrupts
from grpo_mlflow.runtime.console import Console
from grpo_mlflow.runtime.pace import told_if_slow
from grpo_mlflow.runtime.processes import Processes
from grpo_mlflow.tasks import Task
from grpo_mlflow.training.checkpoint import Checkpoint
from grpo_mlflow.training.sources import Recording, open_recording


@dataclass(frozen=True, slots=True)
class Models:
    """The model that is trained, its reference (None without KL), and where the first was loaded from.

    `initial` returns where the model before training is loaded from.
    """

    actor: Policy
    reference: Policy | None
    source: str | Path
    initial: Callable[[], str | Path]


def load(
    config: Config,
    checkpoint: Checkpoint | None,
    processes: Processes,
    console: Console,
    recording: Recording | None = None,
) -> Models:
    """Load the models of a training run, from the beginning or from a checkpoint, in all its processes.

    Args:
        recording: the groups to train on instead of sampled ones.

    Raises:
        ModelError: one of them cannot be used.
        ConfigError: what the settings ask for does not go with them.
    """
    start = time.perf_counter()

    def initial() -> str | Path:
        return loading.model_source(config.model.train_id, config, messages.warmup_progress(console))

    source = checkpoint.path if checkpoint else processes.one_after_first(initial)
    device = processes.accelerator.device
    loads = spreading.loads(config, processes, str(source))
    backend = recording.backend if recording else config.generation.backend
    begun = checkpoint.iteration if checkpoint else 0

    def load_actor(turn: Turn) -> tuple[Policy, int]:
        found = replace(turn(lambda: loading.trained(config, source, device)), served=backend != "local")
        return _prove(config, found, turn, console, begun, recording)

    with told_if_slow(console.say, messages.loading(config.model.train_id)):
        actor, most = loads(load_actor, source)
        named = processes.one_after_first(lambda: loading.other_reference(config, actor, initial))
        if config.model.ref_device is not None:  # elsewhere, it takes no room that shards would save
            loads = spreading.loads_whole(processes)
        reference = (
            loading.reference(config, actor, initial)
            if named is None
            else loads(lambda turn: (turn(lambda: _other_reference(config, actor, initial, most)), most), named)[0]
        )
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
    is_initial = not source
    if is_initial:
        report = messages.warmup_progress(console)
        source = processes.one_after_first(lambda: loading.model_source(config.model.train_id, config, report))
    device = processes.accelerator.device
    with told_if_slow(console.say, messages.loading(str(source))):
        found = processes.one_after_first(lambda: loading.measured(config, source, device, is_initial=is_initial))
        found, _ = _prove(config, found, processes.one_after_first, console, None)
    return found, source


def meet(config: Config, task: Task, actor: Policy, begun: int | None, recording: Recording | None) -> int:
    """Let the model meet what the run gives it; return the most tokens that a row will have.

    Args:
        begun: iterations that the run has behind it; None: it only evaluates.

    Raises:
        ModelError: it does not go with that.
        ConfigError: what the settings ask for does not go with it.
    """
    most = preflight.require(config, task, actor, begun)
    return most if recording is None else max(most, preflight.require_recorded(config, actor, recording, begun or 0))


def _prove(
    config: Config,
    actor: Policy,
    turn: Turn,
    console: Console,
    begun: int | None,
    recording: Recording | None = None,
) -> tuple[Policy, int]:
    """Let the model meet the run and prove its ways; return it and the most tokens that a row will have."""
    task = tasks.of(config)
    most = turn(lambda: meet(config, task, actor, begun, recording))
    actor, _ = turn(lambda: self_check.prove(actor, most))
    idle = preflight.idle_arguments(config, task, actor, trains=begun is not None)
    for line in (messages.sampled_how(config, actor), idle):
        if line:
            console.say(line)
    return actor, most


def _other_reference(config: Config, actor: Policy, initial: Callable[[], str | Path], most: int) -> Policy:
    """Load a reference that is another model than the trained one, and prove its ways."""
    found = loading.reference(config, actor, initial)
    assert found is not None, "train.kl_coef asks for one"
    found = replace(found, sampled=actor.sampled, served=actor.served)
    return self_check.prove(found, most)[0]


def require(config: Config, console: Console) -> None:
    """Load the models of a training run and let them go, before anything is made that could only fail with them.

    Raises:
        ModelError: one of them cannot be used.
        ConfigError: what the settings ask for does not go with them.
    """
    with interrupts.handled():
        check(config, loading.model_source(config.model.train_id, config, messages.warmup_progress(console)))


def check(config: Config, source: str | Path) -> tuple[Policy, float]:
    """Return the model that a run would train, and the seconds that its proof took; the reference is let go.

    Raises:
        ModelError: one of them cannot be used.
        ConfigError: what the settings ask for does not go with them.
    """
    recording = open_recording(config)
    actor = loading.trained(config, source, choose_device(config.model.device))
    most = meet(config, tasks.of(config), actor, 0, recording)
    actor, seconds = self_check.prove(actor, most)
    if loading.other_reference(config, actor, lambda: source) is not None:
        _other_reference(config, actor, lambda: source, most)
    return actor, seconds
