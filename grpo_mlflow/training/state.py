"""What a checkpoint holds besides the weights: all that a resumed run needs to continue exactly.

MLmodel and others              what MLflow loads and serves the weights with (`model.servable`)
trainer/optimizer.safetensors   per-parameter state of the optimizer
trainer/ahead.jsonl             the groups that were sampled ahead, if any
trainer/config.yaml             the config, without secrets
trainer/state.json              the run, the learner's counters, the progress
"""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from grpo_mlflow.config import dump
from grpo_mlflow.errors import redact
from grpo_mlflow.model import servable, sharding
from grpo_mlflow.training import serving
from grpo_mlflow.training.checkpoint import Checkpoint, name_of, reading
from grpo_mlflow.training.learner import Learner
from grpo_mlflow.training.parts import Parts
from grpo_mlflow.training.progress import Progress
from grpo_mlflow.training.sources import AHEAD


def save(parts: Parts, progress: Progress, score: float | None) -> None:
    """Write a checkpoint of the run and publish it; the first process does, and the others give it their shards.

    Args:
        score: the pass@1 of the weights, if they were evaluated.
    """
    model, processes = parts.policy.model, parts.processes
    parts.learner.offer()
    with processes.collective(common=False) if sharding.is_sharded(model) else nullcontext():
        if not processes.is_first:
            sharding.take_part(model)
            return
        with sharding.leading(model):
            parts.tracker.flush()  # a run that goes on from here does not log again what came before
            path = parts.store.save(progress.iteration, score, lambda folder: write(folder, parts, progress))
    parts.tracker.publish(f"checkpoints/{path.name}")


def lack(parts: Parts) -> str | None:
    """Return why `save` cannot be called now, when the run may have lost a process; None: it can."""
    if not sharding.is_sharded(parts.policy.model) or parts.processes.meet():
        return None
    return "a process is gone or has failed, and its share of the weights with it; the last checkpoint counts"


def write(folder: Path, parts: Parts, progress: Progress) -> None:
    """Write the policy and the state of a run into the folder of a new checkpoint."""
    parts.policy.save(folder)
    place = f"checkpoints/{name_of(progress.iteration)}"
    servable.write(folder, parts.policy, parts.config.model, serving.of(parts.config, parts.tracker.run_id, place))
    inner = folder / "trainer"
    inner.mkdir()
    parts.learner.save(inner / "optimizer.safetensors")
    parts.source.save(inner / AHEAD, progress.iteration)
    (inner / "config.yaml").write_text(redact(dump(parts.config)))
    shutil.copymode(inner / "config.yaml", inner / "optimizer.safetensors")  # as `Policy.save` does with weights
    state = {
        "run_id": parts.tracker.run_id,
        "optimizer_step": parts.learner.step,
        "kl_coef": parts.learner.kl_coef,
        "progress": asdict(progress),
    }
    (inner / "state.json").write_text(json.dumps(state, indent=1))


def restore(checkpoint: Checkpoint, learner: Learner) -> Progress:
    """Bring the learner to where a checkpoint was written, and return the progress of that run.

    The weights and the groups that were sampled ahead are read elsewhere (`loading.trained`, `sources.read_ahead`).
    """
    inner = checkpoint.path / "trainer"
    with reading(inner / "state.json"):
        state = json.loads((inner / "state.json").read_text())
        progress, step, kl_coef = Progress.from_json(state["progress"]), state["optimizer_step"], state["kl_coef"]
    learner.restore(inner / "optimizer.safetensors", step, kl_coef)
    return progress
