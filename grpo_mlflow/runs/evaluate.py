"""A run that measures a model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from grpo_mlflow import tasks, tracking
from grpo_mlflow.config import Config, Resolved
from grpo_mlflow.errors import UserError
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.runs import naming, notes, published
from grpo_mlflow.runs.generators import open_generators
from grpo_mlflow.runs.models import load_measured
from grpo_mlflow.runs.session import Gathered, Nested, gathered
from grpo_mlflow.tasks import contents
from grpo_mlflow.tracking import Tracker
from grpo_mlflow.training import evaluation, outlook


def evaluate(
    resolved: Resolved, source: str | Path, nested: Nested | None = None, before: Sequence[range] = ()
) -> evaluation.Evaluation:
    """Evaluate a model folder or hub id (empty: model.train_id) in a run of its own.

    Problems that evaluation seeds of `before` have as well are left out.
    """
    config = resolved.config
    with gathered(resolved, "evaluate", nested=nested is not None) as here:
        actor, source = load_measured(config, source, here.processes, here.console)
        owner = published.owner(source)
        origin = _origin(config, owner) if owner else None
        name = origin.named if origin else naming.of_evaluation(naming.model(_shown(config, source)))
        with here.opened(nested=nested, name=name) as tracker:
            tags = {"grpo.evaluated_model": origin.address if origin else str(source)}
            tracker.tags({**tags, "grpo.evaluated_run": owner[0]} if owner else tags)
            return _measure(here, tracker, actor, source, origin, before)


@dataclass(frozen=True, slots=True)
class _Origin:
    """A run of this store, and the name of the checkpoint of it that is measured."""

    run_id: str
    run_name: str
    checkpoint: str

    @property
    def named(self) -> str:
        return naming.of_evaluation(self.run_name, self.checkpoint)

    @property
    def address(self) -> str:
        return f"runs:/{self.run_id}/checkpoints/{self.checkpoint}"


def _origin(config: Config, owner: tuple[str, str]) -> _Origin | None:
    """Return where a checkpoint comes from; None if its run is not in this store."""
    with suppress(UserError):
        run = tracking.find_run(tracking.connect(config.tracking.uri), owner[0])
        return _Origin(owner[0], run.info.run_name, owner[1])
    return None


def _shown(config: Config, source: str | Path) -> str:
    """Return how a model is asked for: the embedded one lies in a cache of this machine."""
    return "tiny" if config.model.train_id == "tiny" and published.owner(source) is None else str(source)


def _measure(
    here: Gathered,
    tracker: Tracker,
    actor: Policy,
    source: str | Path,
    origin: _Origin | None,
    before: Sequence[range],
) -> evaluation.Evaluation:
    """Evaluate the model in the open run, which gets what was found."""
    config, console = here.resolved.config, here.console
    task = tasks.of(config, tracker.run_dir)
    if remark := contents.evaluation_problems(task, config, before)[1]:
        console.say(remark)
    console.say(outlook.planned_evaluation(config))
    with open_generators(config, actor, source, source, tracker, console, trains=False) as generators:
        generator = generators.evaluation()
        generator.sync(0)
        start = time.perf_counter()
        result = evaluation.evaluate(task, actor, generator, config, here.processes, before=before)
        seconds = time.perf_counter() - start
    evaluation.track(tracker, result, 0, seconds, config.tracking.samples)
    owner = (origin.run_id, origin.checkpoint) if origin else None
    if owner is not None:
        tracker.measured(*owner, evaluation.named(result.metrics()))
    tracker.note(notes.measured(result, config, _shown(config, source), tracker, owner))
    console.say(
        f"{source} on {config.data.task}, at most {evaluation.evaluation_sampling(config).max_new_tokens} tokens"
    )
    console.say(f"{result.summary()}  {seconds:.1f}s")
    for name, value in result.metrics().items():
        console.say(f"  {name:<24}{value:.4g}")
    return result
