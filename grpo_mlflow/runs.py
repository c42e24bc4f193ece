"""A whole run from a resolved config: put the parts together, track it, end it truthfully."""

from __future__ import annotations

import errno
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version as version_of
from pathlib import Path

import torch

from grpo_mlflow import (
    __version__,
    allocator,
    evaluation,
    generation,
    interrupts,
    messages,
    models,
    policy,
    sources,
    tracking,
    trainer,
)
from grpo_mlflow.checkpoint import CheckpointStore
from grpo_mlflow.collector import Collector, read_ahead
from grpo_mlflow.config import Config, Resolved, dump, flatten
from grpo_mlflow.console import Console
from grpo_mlflow.errors import Pruned, ServerFailed, UserError, one_line
from grpo_mlflow.processes import Processes, join
from grpo_mlflow.sources import Stored
from grpo_mlflow.tracking import NullTracker
from grpo_mlflow.trainer import Progress, Trainer
from grpo_mlflow.update import Learner, Sizes


@dataclass(frozen=True, slots=True)
class Finished:
    """A training run that reached its end."""

    run_id: str
    run_dir: Path
    progress: Progress


@dataclass(frozen=True, slots=True)
class Nested:
    """Where a run stands that is part of another."""

    parent_run_id: str
    name: str
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Trial:
    """A training run as part of a study: where it stands, how it reports to the study, what it need not measure."""

    nested: Nested
    on_start: Callable[[str], None]
    on_evaluation: Callable[[Progress, evaluation.Evaluation], None] | None = None
    baseline: evaluation.Evaluation | None = None


def train(resolved: Resolved, stored: Stored | None = None, trial: Trial | None = None) -> Finished:
    """Train, from the beginning or from `stored`; as a trial of a study, it may end with `Pruned`."""
    config = resolved.config
    nested = trial.nested if trial else None
    recorded = sources.recorded(config)  # before a run is opened that could only fail
    with session(resolved, "train", stored, nested) as (processes, tracker, console):
        if trial:
            trial.on_start(tracker.run_id)
        device = processes.accelerator.device
        start = time.perf_counter()
        resumed = stored.checkpoint if stored else None

        def initial() -> str | Path:
            return sources.model_source(config.model.train_id, config, messages.warmup_progress(console))

        source = resumed.path if resumed else processes.one_after_first(initial)
        actor = processes.one_after_first(lambda: models.trained(config, source, device))
        reference = processes.one_after_first(lambda: models.reference(config, actor, initial))
        console.say(messages.introduce(config, actor, time.perf_counter() - start))
        sizes = Sizes(
            temperature=config.generation.temperature,
            max_completion_length=config.generation.max_new_tokens,
            rollouts_per_step=config.rollouts_per_step,
            total_steps=config.train.iterations * config.steps_per_iteration,
        )
        with processes.collective():
            learner = Learner(actor, reference, processes.accelerator, config.train, sizes)
        store = processes.one_after_first(
            lambda: CheckpointStore(tracker.run_dir / "checkpoints", config.checkpoint.keep_last)
        )
        progress = None
        if resumed:
            inner = resumed.path / "trainer"
            state = trainer.load_state(inner / "state.json")
            learner.restore(inner / "optimizer.safetensors", state["optimizer_step"], state["kl_coef"])
            progress = Progress.from_state(state)
            console.say(f"resumed at iteration {progress.iteration} of {config.train.iterations}")
            if processes.is_first:
                _abandon_later(resumed.iteration, tracker, store)
        task = sources.make_task(config)
        first = initial() if resumed and config.generation.sync == "none" else source
        with _generators(config, actor, source, first, tracker, console) as generators:
            collector = Collector(
                config,
                task,
                actor,
                generators.training(),
                processes,
                recorded,
                read_ahead(resumed) if resumed else None,
            )
            loop = Trainer(
                config,
                task,
                actor,
                collector,
                generators.evaluation(),
                learner,
                processes,
                tracker,
                store,
                console,
                progress,
                trial.on_evaluation if trial else None,
                trial.baseline if trial else None,
            )
            ended = loop.run()
        console.say(messages.conclude(config, ended, tracker))
    return Finished(tracker.run_id, tracker.run_dir, ended)


def evaluate(resolved: Resolved, source: str | Path, nested: Nested | None = None) -> evaluation.Evaluation:
    """Evaluate a model folder or hub id (empty: model.train_id) in a run of its own."""
    config = resolved.config
    with session(resolved, "evaluate", nested=nested) as (processes, tracker, console):
        if not source:
            report = messages.warmup_progress(console)
            source = processes.one_after_first(lambda: sources.model_source(config.model.train_id, config, report))
        tracker.tags({"grpo.evaluated_model": str(source)})
        device = processes.accelerator.device
        actor = processes.one_after_first(lambda: policy.load_as(config.model, source, device))
        with _generators(config, actor, source, source, tracker, console) as generators:
            generator = generators.evaluation()
            generator.sync(0)
            start = time.perf_counter()
            result = evaluation.evaluate(sources.make_task(config), actor, generator, config, processes)
            seconds = time.perf_counter() - start
        evaluation.track(tracker, result, 0, seconds, config.tracking.samples)
        console.say(f"{source} on {config.data.task}, at most {config.generation.max_new_tokens} tokens")
        console.say(f"{result.summary()}  {seconds:.1f}s")
        for name, value in result.metrics().items():
            console.say(f"  {name:<24}{value:.4g}")
    return result


def warmup(resolved: Resolved) -> Path:
    """Make the embedded model of the config's task and return its folder."""
    with session(resolved, "warmup") as (processes, tracker, console):
        report = messages.warmup_progress(console)

        def progress(step: int, steps: int, loss: float) -> None:
            report(step, steps, loss)
            if step % 25 == 0 or step == steps:
                tracker.metrics({"warmup/loss": loss}, step)

        folder = Path(processes.one_after_first(lambda: sources.model_source("tiny", resolved.config, progress)))
        tracker.tags({"grpo.model_folder": str(folder)})
        console.say(f"model: {folder}")
    return folder


@contextmanager
def session(
    resolved: Resolved, kind: str, stored: Stored | None = None, nested: Nested | None = None
) -> Iterator[tuple[Processes, NullTracker, Console]]:
    """Open the run, log what it is, and set its status to how the block ends."""
    config = resolved.config
    allocator.keep_freed()
    processes = join(config, policy.choose_device(config.model.device))
    level = logging.WARNING if processes.is_first else logging.ERROR
    logging.basicConfig(format="%(levelname)s: %(message)s", level=level)
    console = Console(quiet=nested is not None or not processes.is_first)
    for warning in resolved.warnings:
        console.warn(warning)
    opened: NullTracker | None = None

    def fail() -> None:
        if opened is not None:
            _fail(config, kind, opened, processes, console)

    with interrupts.handled(), processes.watched(on_hang=fail):
        try:
            with interrupts.deferred():
                opened = _open(config, kind, stored, nested, processes)
        except interrupts.Interrupted:
            if opened is not None:
                opened.finish("KILLED")
            raise
        tracker = opened
        try:
            described = config.model_copy(update={"resume": None})
            tracker.params(_parameters(described, kind))
            tracker.tags(_versions())
            tracker.text("config/resolved.yaml", dump(described))
            if stored is not None and resolved.config.resume is not None:
                changed = [f"{key}={flatten(described.model_dump())[key]}" for key in _overridden(resolved)]
                tracker.tags({"grpo.resumed_with": " ".join(changed)})
            yield processes, tracker, console
        except Pruned:
            tracker.tags({"optuna.state": "PRUNED"})
            tracker.finish("KILLED")
            raise
        except (interrupts.Interrupted, KeyboardInterrupt):
            tracker.finish("KILLED")
            console.say(messages.how_to_resume(config, kind, tracker, "stopped"))
            raise
        except BaseException as error:
            fail()
            full = os.strerror(errno.ENOSPC) in str(error)  # also in what other libraries make of it
            if full and not isinstance(error, UserError):
                raise UserError(f"the disk is full: {one_line(error)}") from error
            raise
        with interrupts.deferred():
            tracker.finish("FINISHED")


@contextmanager
def _generators(
    config: Config,
    actor: policy.Policy,
    source: str | Path,
    initial: str | Path,
    tracker: NullTracker,
    console: Console,
) -> Iterator[generation.Generators]:
    """Open what samples; the log of a server of our own is kept with the run where the server failed."""
    log = tracker.run_dir / "server.log"
    try:
        with generation.Generators(config, actor, source, initial, log, console.say) as generators:
            yield generators
    except ServerFailed:
        if log.exists():
            tracker.publish(log.name)
        raise


def _parameters(config: Config, kind: str) -> dict[str, object]:
    """Return what MLflow shows of the config; lr on its log scale too, since the UI's axes are linear."""
    flat = flatten(config.model_dump(mode="json"))
    hidden = "resume" if kind == "optimize" else ("resume", "search.")
    shown = {key: value for key, value in flat.items() if not key.startswith(hidden)}
    return {**shown, "train.log10_lr": round(math.log10(config.train.lr), 6)}


def _open(config: Config, kind: str, stored: Stored | None, nested: Nested | None, processes: Processes) -> NullTracker:
    tracker = NullTracker(Path())

    def start() -> None:
        nonlocal tracker
        place = (nested.parent_run_id, nested.name, nested.tags) if nested else None
        tracker = tracking.start(config.tracking, kind, stored.run_id if stored else None, place)
        if nested:
            tracker.tags(nested.tags)

    processes.decided(start)
    tracker.run_id, tracker.run_dir = processes.broadcast((tracker.run_id, tracker.run_dir))
    return tracker


def _fail(config: Config, kind: str, tracker: NullTracker, processes: Processes, console: Console) -> None:
    """Mark the run FAILED and say how to go on; where the process that tracks it is gone, the second does."""
    if processes.first_lost and processes.rank == 1:
        console = Console()
        tracking.set_failed(config.tracking.uri, tracker.run_id)
    try:
        tracker.finish("FAILED")
    except OSError as error:  # a full disk, of which the run may have failed: what failed first is told
        console.warn(f"run {tracker.run_id} could not be marked FAILED: {one_line(error)}")
    console.say(messages.how_to_resume(config, kind, tracker, "failed"))


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "accelerate", "mlflow")
    found = {f"version.{name}": version_of(name) for name in packages}
    return {
        **found,
        "version.grpo_mlflow": __version__,
        "version.python": platform.python_version(),
        "machine.threads": str(torch.get_num_threads()),  # bit-exact repetition needs the same number
    }


def _overridden(resolved: Resolved) -> list[str]:
    return [key for key, origin in resolved.origins.items() if origin == "override" and key != "resume"]


def _abandon_later(iteration: int, tracker: NullTracker, store: CheckpointStore) -> None:
    """Take the checkpoints after `iteration` out of the way: the run goes on from there on another branch."""
    for name in store.set_aside_after(iteration):
        tracker.remove(f"checkpoints/{name}")
