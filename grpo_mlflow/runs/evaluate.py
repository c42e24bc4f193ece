"""A run that measures a model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from grpo_mlflow import tasks
from grpo_mlflow.config import Resolved
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.runs import published
from grpo_mlflow.runs.generators import open_generators
from grpo_mlflow.runs.models import load_measured
from grpo_mlflow.runs.session import Gathered, Nested, gathered
from grpo_mlflow.tasks import contents
from grpo_mlflow.tracking import Tracker
from grpo_mlflow.training import evaluation


def evaluate(
    resolved: Resolved, source: str | Path, nested: Nested | None = None, before: Sequence[range] = ()
) -> evaluation.Evaluation:
    """Evaluate a model folder or hub id (empty: model.train_id) in a run of its own.

    Problems that evaluation seeds of `before` have as well are left out.
    """
    config = resolved.config
    with gathered(resolved, "evaluate", nested=nested is not None) as here:
        actor, source = load_measured(config, source, here.processes, here.console)
        with here.opened(nested=nested) as tracker:
            tracker.tags({"grpo.evaluated_model": str(source)})
            return _measure(here, tracker, actor, source, before)


def _measure(
    here: Gathered, tracker: Tracker, actor: Policy, source: str | Path, before: Sequence[range]
) -> evaluation.Evaluation:
    """Evaluate the model in the open run, which gets what was found."""
    config, console = here.resolved.config, here.console
    task = tasks.of(config, tracker.run_dir)
    if remark := contents.evaluation_problems(task, config, before)[1]:
        console.say(remark)
    with open_generators(config, actor, source, source, tracker, console, trains=False) as generators:
        generator = generators.evaluation()
        generator.sync(0)
        start = time.perf_counter()
        result = evaluation.evaluate(task, actor, generator, config, here.processes, before=before)
        seconds = time.perf_counter() - start
    evaluation.track(tracker, result, 0, seconds, config.tracking.samples)
    if (owner := published.owner(source)) is not None:
        tracker.measured(*owner, evaluation.named(result.metrics()))
    console.say(
        f"{source} on {config.data.task}, at most {evaluation.evaluation_sampling(config).max_new_tokens} tokens"
    )
    console.say(f"{result.summary()}  {seconds:.1f}s")
    for name, value in result.metrics().items():
        console.say(f"  {name:<24}{value:.4g}")
    return result
