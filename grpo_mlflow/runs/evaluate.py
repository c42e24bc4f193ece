"""A run that measures a model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
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
        run_name = _run_name(config, owner[0]) if owner else None
        asked = "tiny" if owner is None and config.model.train_id == "tiny" else str(source)  # it lies in our cache
        if owner is not None and run_name is not None:
            name, model = naming.of_evaluation(run_name, owner[1]), tracking.checkpoint_address(*owner)
        else:
            name, model = naming.of_evaluation(naming.model(asked)), str(source)
        with here.opened(nested=nested, name=name) as tracker:
            tags = {"grpo.evaluated_model": model}
            tracker.tags({**tags, "grpo.evaluated_run": owner[0]} if owner else tags)
            result = _measure(here, tracker, actor, source, before)
            known = owner if run_name is not None else None
            if known is not None:
                tracker.measured(*known, evaluation.named(result.metrics()))
            tracker.note(notes.measured(result, config, asked, tracker, known))
            return result


def _run_name(config: Config, run_id: str) -> str | None:
    """Return the name of a run; None if it is not in this store."""
    with suppress(UserError):
        return str(tracking.find_run(tracking.connect(config.tracking.uri), run_id).info.run_name)
    return None


def _measure(
    here: Gathered, tracker: Tracker, actor: Policy, source: str | Path, before: Sequence[range]
) -> evaluation.Evaluation:
    """Evaluate the model in the open run, which gets what was found."""
    config, console = here.resolved.config, here.console
    task = tasks.of(config, tracker.run_dir)
    if remark := contents.evaluation_problems(task, config, before)[1]:
        console.say(remark)
    console.say(outlook.planned_evaluation(config))
    with open_generators(
        config, actor, source, source, tracker, console, processes=here.processes, trains=False
    ) as generators:
        generator = generators.evaluation()
        generator.sync(0)
        start = time.perf_counter()
        result = evaluation.evaluate(task, actor, generator, config, here.processes, before=before)
        seconds = time.perf_counter() - start
    evaluation.track(tracker, result, 0, seconds, config.tracking.samples)
    console.say(
        f"{source} on {config.data.task}, at most {evaluation.evaluation_sampling(config).max_new_tokens} tokens"
    )
    console.say(f"{result.summary()}  {seconds:.1f}s")
    for name, value in result.metrics().items():
        console.say(f"  {name:<24}{value:.4g}")
    return result
