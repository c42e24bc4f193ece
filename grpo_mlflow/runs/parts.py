"""From a config to the parts of a training run, from the beginning or from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from grpo_mlflow import tasks
from grpo_mlflow.config import Config
from grpo_mlflow.generation import Generator
from grpo_mlflow.generation.server.sync import SYNCS
from grpo_mlflow.runs.generators import open_generators
from grpo_mlflow.runs.models import Models
from grpo_mlflow.runtime.console import Console
from grpo_mlflow.runtime.pace import Pace
from grpo_mlflow.runtime.processes import Processes
from grpo_mlflow.tasks import contents
from grpo_mlflow.tracking import Tracker
from grpo_mlflow.training import state
from grpo_mlflow.training.checkpoint import Checkpoint, CheckpointStore
from grpo_mlflow.training.learner import Learner, Sizes
from grpo_mlflow.training.parts import Parts
from grpo_mlflow.training.progress import Progress
from grpo_mlflow.training.sources import Recording, group_source, read_ahead


@contextmanager
def open_parts(
    config: Config,
    models: Models,
    checkpoint: Checkpoint | None,
    recording: Recording | None,
    *,
    processes: Processes,
    tracker: Tracker,
    console: Console,
) -> Iterator[tuple[Parts, Progress | None]]:
    """Make the parts of a run, and read where it stands if it goes on from a checkpoint; close them in the end.

    Several processes make each part in step, so the order of what follows is the same in all of them.

    Args:
        recording: the groups to train on instead of sampled ones.
    """
    learner = _learner(config, models, processes, Pace(console.say))
    store = processes.one_after_first(lambda: _store(config, tracker))
    progress = None
    if processes.is_first:
        store.remove_leftovers()
    if checkpoint:
        progress = state.restore(checkpoint, learner)
        console.say(f"resumed at iteration {progress.iteration} of {config.train.iterations}")
        if processes.is_first:
            _abandon_later(checkpoint, tracker, store)
    task = tasks.of(config, tracker.run_dir)
    first = models.source if not checkpoint or SYNCS[config.generation.sync].sends else models.initial()
    with open_generators(
        config, models.actor, models.source, first, tracker, console, processes=processes
    ) as generators:
        ahead = read_ahead(checkpoint) if checkpoint else None
        source = group_source(
            config, task, models.actor, generators.training, processes, recording=recording, ahead=ahead
        )
        _sync(config, recording, progress, generators.training)
        parts = Parts(
            config=config,
            task=task,
            policy=models.actor,
            source=source,
            evaluator=generators.evaluation() if config.eval.enabled else None,
            learner=learner,
            processes=processes,
            tracker=tracker,
            store=store,
            console=console,
        )
        yield parts, _of_different_problems(progress, task, config)


def _store(config: Config, tracker: Tracker) -> CheckpointStore:
    return CheckpointStore(tracker.run_dir / "checkpoints", config.checkpoint.keep_last)


def _sync(
    config: Config, recording: Recording | None, progress: Progress | None, make_generator: Callable[[], Generator]
) -> None:
    """Give what samples its first weights now, so that a server that cannot be trained with is refused at once."""
    version = progress.iteration if progress else 0
    if recording is None and version < config.train.iterations:
        make_generator().sync(version)


def _learner(config: Config, models: Models, processes: Processes, pace: Pace) -> Learner:
    sizes = Sizes(
        temperature=config.generation.temperature,
        max_completion_length=config.generation.max_new_tokens,
        rollouts_per_step=config.rollouts_per_step,
        total_steps=config.train.iterations * config.steps_per_iteration,
    )
    with processes.collective():
        return Learner(models.actor, models.reference, processes.accelerator, config.train, sizes, pace=pace)


def _abandon_later(checkpoint: Checkpoint, tracker: Tracker, store: CheckpointStore) -> None:
    """Take the checkpoints after this one out of the way: the run goes on from there on another branch."""
    for name in store.set_aside_after(checkpoint.iteration):
        tracker.remove(f"checkpoints/{name}")
    if checkpoint.path.parent == store.root:  # a kill may have cut off its upload
        tracker.publish(f"checkpoints/{checkpoint.path.name}")
    tracker.models(tracker.run_id, [])  # hides those of the abandoned, and of what a killed process had deleted


def _of_different_problems(progress: Progress | None, task: tasks.Task, config: Config) -> Progress | None:
    if progress is None or not config.eval.enabled:
        return progress
    problems, _ = contents.evaluation_problems(task, config)
    return progress.at([problem.seed - config.eval.id_seed_start for problem in problems])
