"""A run that measures a model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from grpo_mlflow import tasks
from grpo_mlflow.config import Resolved
from grpo_mlflow.model import loading, policy
from grpo_mlflow.runs import messages
from grpo_mlflow.runs.generators import open_generators
from grpo_mlflow.runs.session import Nested, session
from grpo_mlflow.tasks import contents
from grpo_mlflow.training import evaluation


def evaluate(
    resolved: Resolved, source: str | Path, nested: Nested | None = None, before: Sequence[range] = ()
) -> evaluation.Evaluation:
    """Evaluate a model folder or hub id (empty: model.train_id) in a run of its own.

    Problems that evaluation seeds of `before` have as well are left out.
    """
    config = resolved.config
    with session(resolved, "evaluate", nested=nested) as (processes, tracker, console):
        if not source:
            report = messages.warmup_progress(console)
            source = processes.one_after_first(lambda: loading.model_source(config.model.train_id, config, report))
        task = tasks.of(config)
        if remark := contents.evaluation_problems(task, config, before)[1]:
            console.say(remark)
        tracker.tags({"grpo.evaluated_model": str(source)})
        device = processes.accelerator.device
        actor = processes.one_after_first(lambda: policy.load_as(config.model, source, device))
        with open_generators(config, actor, source, source, tracker, console, trains=False) as generators:
            generator = generators.evaluation()
            generator.sync(0)
            start = time.perf_counter()
            result = evaluation.evaluate(task, actor, generator, config, processes, before=before)
            seconds = time.perf_counter() - start
        evaluation.track(tracker, result, 0, seconds, config.tracking.samples)
        console.say(
            f"{source} on {config.data.task}, at most {evaluation.evaluation_sampling(config).max_new_tokens} tokens"
        )
        console.say(f"{result.summary()}  {seconds:.1f}s")
        for name, value in result.metrics().items():
            console.say(f"  {name:<24}{value:.4g}")
    return result
