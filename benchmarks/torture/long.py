"""A run of thousands of iterations: does the last one cost more time, memory or open files than the first ones?

Sampling and the update are stubs, which take next to no time. All else is a run's own: problems, verdicts, advantages,
MLflow, files, checkpoints, evaluations, the watch over the metrics.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median

import psutil

from benchmarks.torture import processes, works
from benchmarks.torture.records import Record
from grpo_mlflow import tasks
from grpo_mlflow.config import resolve
from grpo_mlflow.generation import Sampling
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.runs.models import load
from grpo_mlflow.runs.session import gathered
from grpo_mlflow.seeding import stream
from grpo_mlflow.training.checkpoint import CheckpointStore
from grpo_mlflow.training.learner import Learner, Sizes
from grpo_mlflow.training.parts import Parts
from grpo_mlflow.training.sources import group_source
from grpo_mlflow.training.trainer import Trainer
from grpo_mlflow.types import Completion, Group, Prompt

_HOURS = 24.0
_EACH = 100  # iterations between two looks: one checkpoint
_MEMORY, _FILES, _TIME, _NOISE = 16.0, 2, 1.25, 1.0  # what the last quarter may have more of: MB, files, times, ms
_WORDS = (
    *("generation.async_rollouts=0", "tracking.rollouts=true", "eval.interval=500", "eval.num_ids=8", "eval.ks=[1]"),
    *("checkpoint.save_interval=100", "checkpoint.keep_last=2", "tracking.system_metrics=true", "train.kl_coef=0"),
    *("data.problems_per_iteration=2", "data.rollouts_per_problem=2", "train.batch_size=4", "train.lr_warmup_steps=0"),
)


class Sampler:
    """Draws tokens without a model."""

    def __init__(self, policy: Policy) -> None:
        self._tokenizer = policy.tokenizer
        self._stop = policy.tokenizer.eos_token_id

    def generate(
        self, prompts: Sequence[Prompt], k: int, sampling: Sampling, seed: int, key: tuple[str | int, ...]
    ) -> list[list[Completion]]:
        draws = stream(seed, "long", *key)
        return [[self._completion(draws.integers(3, 20, size=4).tolist()) for _ in range(k)] for _ in prompts]

    def _completion(self, drawn: list[int]) -> Completion:
        text: str = self._tokenizer.decode(drawn)
        return Completion((*drawn, self._stop), text, (-1.0,) * (len(drawn) + 1), "stop", 0)

    def sync(self, version: int) -> None:
        pass

    def metrics(self) -> dict[str, float]:
        return {"sampled": 1.0}


class Update(Learner):
    """Learns nothing, and looks at the process now and then."""

    looks: list[dict[str, float]]

    def update(self, groups: Sequence[Group], seed: int, iteration: int) -> dict[str, float | None]:
        if iteration % _EACH == 0:
            own = psutil.Process()
            self.looks.append(
                {
                    "iteration": iteration,
                    "wall": time.perf_counter(),
                    "cpu": time.process_time(),
                    "memory": own.memory_info().rss / 2**20,
                    "files": own.num_fds(),
                    "threads": own.num_threads(),
                }
            )
        self.step += 1
        drawn = stream(seed, "update", iteration).random(12)
        metrics: dict[str, float | None] = {f"stub_{i}": float(value) for i, value in enumerate(drawn)}
        return {**metrics, "loss_total": float(drawn[0]), "grad_norm": 1.0, "entropy_mean": 1.0, "tokens_trained": 20.0}


def run(folder: Path, number: int, iterations: int) -> Record:
    """Train for so many iterations in a forked process, and compare its second quarter with its last."""
    record, began = Record(number, 0, "long run", "", struck=True, count=iterations), time.monotonic()
    here = folder / f"l{number:06d}"
    shutil.rmtree(here, ignore_errors=True)
    processes.wait(processes.fork(folder, "make.log", partial(works.make, here, folder, "long", "")))
    record.codes.append(processes.wait(processes.fork(here, "1.log", partial(_train, iterations)), hangs=_HOURS * 3600))
    if record.codes[-1]:
        record.wrong.append(f"ended with {record.codes[-1]}")
        return record
    looks = json.loads((here / "looks.json").read_text())
    record.figures = figures(looks)
    record.wrong += grown(record.figures)
    record.seconds = round(time.monotonic() - began, 2)
    if not record.wrong:
        shutil.rmtree(here)
    return record


def figures(looks: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return medians of the second and of the last quarter: MB, files, threads, and ms for an iteration."""
    found: dict[str, float] = {}
    quarter = len(looks) // 4
    for name, part in (("early", looks[quarter : 2 * quarter + 1]), ("late", looks[-quarter - 1 :])):
        for key in ("memory", "files", "threads"):
            found[f"{key}_{name}"] = round(median(look[key] for look in part), 2)
        for key in ("wall", "cpu"):
            steps = [(b[key] - a[key]) / (b["iteration"] - a["iteration"]) for a, b in pairwise(part)]
            found[f"ms_{key}_{name}"] = round(1000 * median(steps), 3)
    return found


def grown(found: dict[str, float]) -> list[str]:
    """Return what the last quarter has more of than the second."""
    wrong = []
    if found["memory_late"] > found["memory_early"] + _MEMORY:
        wrong.append(f"memory grows: {found['memory_early']} to {found['memory_late']} MB")
    for key in ("files", "threads"):
        if found[f"{key}_late"] > found[f"{key}_early"] + _FILES:
            wrong.append(f"{key} grow: {found[f'{key}_early']} to {found[f'{key}_late']}")
    if found["ms_cpu_late"] > found["ms_cpu_early"] * _TIME + _NOISE:
        wrong.append(f"time grows: {found['ms_cpu_early']} to {found['ms_cpu_late']} ms of CPU for an iteration")
    return wrong


def _train(iterations: int) -> None:
    words = [*works.RUN[2:], *_WORDS, f"train.iterations={iterations}", f"tracking.uri={works.STORE}"]
    resolved, looks = resolve("tiny", words), list[dict[str, float]]()
    config = resolved.config
    try:
        with gathered(resolved, "train") as here:
            models = load(config, None, here.processes, here.console)
            with here.opened() as tracker:
                task = tasks.of(config, tracker.run_dir)
                sampler = Sampler(models.actor)
                source = group_source(config, task, models.actor, lambda: sampler, here.processes)
                sizes = Sizes(config.generation.temperature, config.generation.max_new_tokens, 4, iterations)
                learner = Update(models.actor, None, here.processes.accelerator, config.train, sizes)
                learner.looks = looks
                store = CheckpointStore(tracker.run_dir / "checkpoints", config.checkpoint.keep_last)
                parts = Parts(
                    config=config,
                    task=task,
                    policy=models.actor,
                    source=source,
                    evaluator=sampler,
                    learner=learner,
                    processes=here.processes,
                    tracker=tracker,
                    store=store,
                    console=here.console,
                )
                Trainer(parts).run()
    finally:
        Path("looks.json").write_text(json.dumps(looks))
