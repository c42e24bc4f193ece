"""A whole run from a resolved config: put the parts together, track it, end it truthfully."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from grpo_mlflow import tasks
from grpo_mlflow.config import Resolved
from grpo_mlflow.model import loading
from grpo_mlflow.runs import messages
from grpo_mlflow.runs.generators import open_generators
from grpo_mlflow.runs.session import Nested, session
from grpo_mlflow.runs.stored import Stored
from grpo_mlflow.tracking import Tracker
from grpo_mlflow.training import evaluation, trainer
from grpo_mlflow.training.checkpoint import CheckpointStore
from grpo_mlflow.training.collector import Collector, read_ahead
from grpo_mlflow.training.learner import Learner, Sizes
from grpo_mlflow.training.replay import recorded
from grpo_mlflow.training.trainer import Progress, Trainer


@dataclass(frozen=True, slots=True)
class Finished:
    """A training run that reached its end."""

    run_id: str
    run_dir: Path
    progress: Progress


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
    replayed = recorded(config)  # before a run is opened that could only fail
    with session(resolved, "train", stored, nested) as (processes, tracker, console):
        if trial:
            trial.on_start(tracker.run_id)
        device = processes.accelerator.device
        start = time.perf_counter()
        resumed = stored.checkpoint if stored else None

        def initial() -> str | Path:
            return loading.model_source(config.model.train_id, config, messages.warmup_progress(console))

        source = resumed.path if resumed else processes.one_after_first(initial)
        actor = processes.one_after_first(lambda: loading.trained(config, source, device))
        reference = processes.one_after_first(lambda: loading.reference(config, actor, initial))
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
        task = tasks.of(config)
        first = initial() if resumed and config.generation.sync == "none" else source
        with open_generators(config, actor, source, first, tracker, console) as generators:
            collector = Collector(
                config,
                task,
                actor,
                generators.training(),
                processes,
                replayed,
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


def _abandon_later(iteration: int, tracker: Tracker, store: CheckpointStore) -> None:
    """Take the checkpoints after `iteration` out of the way: the run goes on from there on another branch."""
    for name in store.set_aside_after(iteration):
        tracker.remove(f"checkpoints/{name}")
