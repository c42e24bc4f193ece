"""A whole run from a resolved config: put the parts together, track it, end it truthfully."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from grpo_mlflow.config import Resolved
from grpo_mlflow.runs import messages, published
from grpo_mlflow.runs.models import load
from grpo_mlflow.runs.parts import open_parts
from grpo_mlflow.runs.session import Nested, gathered
from grpo_mlflow.runs.stored import Stored
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


def train(resolved: Resolved, stored: Stored | None = None, trial: Trial | None = None) -> Finished:
    """Train, from the beginning or from `stored`; as a trial of a study, it may end with `Pruned`."""
    config, checkpoint = resolved.config, stored.checkpoint if stored else None
    recording = open_recording(config)  # before a run is opened that could only fail
    loss.load(config.train)  # as above
    nested = trial.nested if trial else None
    with gathered(resolved, "train", nested=nested is not None) as here:
        processes, console = here.processes, here.console
        models = load(config, checkpoint, processes, console, recording)
        with here.opened(stored, nested) as tracker:
            if trial:
                trial.on_start(tracker.run_id)
            with open_parts(
                config, models, checkpoint, recording, processes=processes, tracker=tracker, console=console
            ) as (parts, progress):
                if config.eval.enabled and processes.is_first and not trial:  # a study says it once for all its trials
                    for line in contents.remarks(parts.task, config):
                        console.say(line)
                ended = Trainer(
                    parts,
                    progress,
                    on_evaluation=trial.on_evaluation if trial else None,
                    baseline=trial.baseline if trial else None,
                ).run()
                if processes.is_first and not trial:  # of a study only the winner
                    published.publish(config, parts.store, tracker)
            console.say(messages.conclude(config, ended, tracker))
    return Finished(tracker.run_id, tracker.run_dir, ended)
