"""A whole run from a resolved config: put the parts together, track it, end it truthfully."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from grpo_mlflow.config import Resolved
from grpo_mlflow.runs import messages, notes, published
from grpo_mlflow.runs.models import load
from grpo_mlflow.runs.parts import open_parts
from grpo_mlflow.runs.reporter import Reporter
from grpo_mlflow.runs.session import Nested, gathered
from grpo_mlflow.runs.stored import Stored
from grpo_mlflow.runtime import interrupts
from grpo_mlflow.tasks import contents
from grpo_mlflow.training import loss
from grpo_mlflow.training.evaluation import Evaluation
from grpo_mlflow.training.progress import Progress
from grpo_mlflow.training.sources import open_recording
from grpo_mlflow.training.trainer import OnEvaluation, Trainer


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
    on_evaluation: OnEvaluation | None = None
    baseline: Evaluation | None = None


def train(
    resolved: Resolved, stored: Stored | None = None, trial: Trial | None = None, *, kept: bool = True
) -> Finished:
    """Train, from the beginning or from `stored`; as a trial of a study, it may end with `Pruned`.

    A run that is not `kept` is deleted by its caller, so no command is shown that would look for it.
    """
    config, checkpoint = resolved.config, stored.checkpoint if stored else None
    recording = open_recording(config)  # before a run is opened that could only fail
    loss.load(config.train)  # as above
    nested = trial.nested if trial else None
    parent = nested.parent_run_id if nested else None
    with gathered(resolved, "train" if kept else "smoke", nested=nested is not None) as here:
        processes, console = here.processes, here.console
        models = load(config, checkpoint, processes, console, recording)
        with here.opened(stored, nested) as tracker:
            tracker.note(notes.under_way(config, tracker, parent))
            if trial:
                trial.on_start(tracker.run_id)
            with open_parts(
                config, models, checkpoint, recording, processes=processes, tracker=tracker, console=console
            ) as (parts, progress):
                if config.eval.enabled and processes.is_first and not trial:  # a study says it once for all its trials
                    for line in contents.remarks(parts.task, config):
                        console.say(line)
                reporter = Reporter(config, tracker, resumed=stored is not None)
                trainer = Trainer(
                    parts,
                    progress,
                    on_evaluation=trial.on_evaluation if trial else None,
                    on_tracked=reporter.note,
                    baseline=trial.baseline if trial else None,
                )
                try:
                    ended = trainer.run()
                finally:
                    if processes.is_first:
                        with interrupts.deferred():
                            reporter.end(trainer.progress)
                if processes.is_first and not trial:  # of a study only the winner
                    published.publish(config, parts.store, tracker)
            if kept:
                most = None if recording is None else recording.iterations
                tracker.note(notes.trained(config, ended, tracker, parent=parent, most=most))
                console.say(messages.conclude(config, ended, tracker, most))
            else:
                console.say(messages.conclude_unkept(config, ended))
    return Finished(tracker.run_id, tracker.run_dir, ended)
