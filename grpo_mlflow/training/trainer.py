"""The training loop.

Everything is counted by policy version: version n is the model after n iterations. At step n of the MLflow axis stand
the evaluation of version n, the rewards of the rollouts that version n sampled, and the update that turns it into
version n + 1. A checkpoint `iter_n` holds version n and all that is needed to go on from it exactly.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from grpo_mlflow.algorithm.statistics import mean
from grpo_mlflow.config import Config, dump
from grpo_mlflow.errors import PeerLost, ServerFailed, StoreAway, redact
from grpo_mlflow.generation import Generator
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.runtime import interrupts
from grpo_mlflow.runtime.console import Console
from grpo_mlflow.runtime.processes import Processes
from grpo_mlflow.tasks import Task
from grpo_mlflow.tracking import Tracker
from grpo_mlflow.training import evaluation, rollout_files, rollout_metrics
from grpo_mlflow.training.checkpoint import CheckpointStore, name_of
from grpo_mlflow.training.collector import AHEAD, Collected, Collector
from grpo_mlflow.training.learner import Learner
from grpo_mlflow.training.throughput import Meter


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands; saved in every checkpoint. The rates are pass@1 per problem, `tokens` were sampled so far."""

    iteration: int = 0
    evaluated: bool = False
    seconds: float = 0.0
    tokens: int = 0
    first_rates: tuple[float, ...] = ()
    last_rates: tuple[float, ...] = ()
    best_score: float | None = None
    best_iteration: int = 0

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progress:
        """Return the progress in what `load_state` read."""
        content = state["progress"]
        return cls(**{**content, **{name: tuple(content[name]) for name in ("first_rates", "last_rates")}})


def load_state(path: Path) -> dict[str, Any]:
    """Read the counters of a checkpoint."""
    content: dict[str, Any] = json.loads(path.read_text())
    return content


@dataclass(slots=True)
class Phases:
    """Seconds spent in each phase of an iteration."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


class Trainer:
    """Runs iterations on parts that it is given; every part can be replaced by a scripted one."""

    def __init__(
        self,
        config: Config,
        task: Task,
        policy: Policy,
        collector: Collector,
        evaluator: Generator,
        learner: Learner,
        processes: Processes,
        tracker: Tracker,
        store: CheckpointStore,
        console: Console,
        progress: Progress | None = None,
        on_evaluation: Callable[[Progress, evaluation.Evaluation], None] | None = None,
        baseline: evaluation.Evaluation | None = None,
    ) -> None:
        self._config, self._task, self._policy = config, task, policy
        self._collector, self._evaluator = collector, evaluator
        self._learner, self._processes, self._tracker = learner, processes, tracker
        self._store, self._console = store, console
        self._on_evaluation, self._baseline = on_evaluation, baseline
        self._meter = Meter(policy, config, processes.count)
        self.progress = progress or Progress()
        self._saved = self.progress.iteration if progress else None
        self._whole = True  # the weights are those of `progress.iteration`

    def run(self) -> Progress:
        """Train up to `train.iterations`.

        A signal, a server that fails, a store or storage that is away, or the loss of another process leaves a
        checkpoint of the last version.
        """
        total = self._config.train.iterations
        self._console.start("training", total, self.progress.iteration)
        try:
            while True:
                interrupts.check()
                version = self.progress.iteration
                if self._evaluation_due(version) and not self.progress.evaluated:
                    self._evaluate(version)
                if self._checkpoint_due(version):
                    self._collector.settle()  # what is sampled ahead belongs into the checkpoint
                    with interrupts.deferred():
                        self._save(version)
                if version >= total:
                    self._track_generators(version)
                    return self.progress
                self.iterate(version)
        except (interrupts.Interrupted, ServerFailed, StoreAway, PeerLost):
            self._collector.stop()
            if self._whole:  # not so where a process was lost in the middle of an update
                with interrupts.deferred():
                    self._save(self.progress.iteration)
            raise
        finally:
            self._collector.stop()
            self._console.stop()

    def iterate(self, version: int) -> None:
        """Sample rollouts with version `version` and update it to the next."""
        start, phases = time.perf_counter(), Phases()
        with phases.measure("generate"):
            collected = self._collector.collect(version)
        with interrupts.deferred():  # from the first optimizer step on, only a whole iteration can be saved
            self._whole = False
            with phases.measure("update"), self._processes.collective():
                metrics = self._learner.update(collected.groups, self._config.seed, version)
            self._track_iteration(version, collected, metrics | collected.metrics(), phases, start)
            spent = self.progress.seconds + time.perf_counter() - start
            tokens = self.progress.tokens + rollout_metrics.tokens(collected.sampled)
            self.progress = replace(self.progress, iteration=version + 1, evaluated=False, seconds=spent, tokens=tokens)
            self._whole = True

    def _evaluation_due(self, version: int) -> bool:
        settings = self._config.eval
        return settings.enabled and (version % settings.interval == 0 or version >= self._config.train.iterations)

    def _evaluate(self, version: int) -> None:
        start = time.perf_counter()
        if version == 0 and self._baseline is not None:
            result = self._baseline
        else:
            self._collector.settle()  # they may share a server, which is about to get other weights
            self._evaluator.sync(version)
            result = evaluation.evaluate(self._task, self._policy, self._evaluator, self._config, self._processes)
        seconds = time.perf_counter() - start
        with interrupts.deferred():
            evaluation.track(self._tracker, result, version, seconds, self._config.tracking.samples)
            rates = tuple(result.success_rates())
            score = result.pass_at(1).value
            evaluated = replace(
                self.progress,
                evaluated=True,
                first_rates=self.progress.first_rates or rates,
                last_rates=rates,
                seconds=self.progress.seconds + time.perf_counter() - start,
            )
            if evaluated.best_score is None or score > evaluated.best_score:
                evaluated = replace(evaluated, best_score=score, best_iteration=version)
        if (hook := self._on_evaluation) is not None:
            self._processes.decided(lambda: hook(evaluated, result))
        # Only now: a run stopped before its study has heard of the evaluation repeats it, with the same outcome.
        self.progress = evaluated
        self._saved = None  # a checkpoint of this version saved before lacks the score
        self._console.say(f"eval {version:>4}  {result.summary()}  {seconds:.1f}s")

    def _checkpoint_due(self, version: int) -> bool:
        if version == 0 or self._saved == version:
            return False
        interval, total = self._config.checkpoint.save_interval, self._config.train.iterations
        is_best = self.progress.evaluated and self.progress.best_iteration == version
        return is_best or version == total or (interval > 0 and version % interval == 0)

    def _save(self, version: int) -> None:
        if self._saved == version or version == 0:
            return
        self._saved = version
        if not self._processes.is_first:
            return
        score = mean(rates) if self.progress.evaluated and (rates := self.progress.last_rates) else None
        self._tracker.flush()  # a run that goes on from here does not log again what came before
        path = self._store.save(version, score, self._write)
        self._tracker.publish(f"checkpoints/{path.name}")
        for name in self._store.prune():
            self._tracker.remove(f"checkpoints/{name}")
        best = self._store.best()
        self._tracker.tags({"grpo.last_checkpoint": path.name, "grpo.best_checkpoint": best.path.name if best else ""})

    def _track_generators(self, version: int) -> None:
        """Log what the last evaluation's sampling met; that of the others stands with the iteration after."""
        met = self._collector.metrics(self._evaluator)
        if met:
            self._tracker.metrics({f"perf/{name}": value for name, value in met.items()}, version)

    def _write(self, folder: Path) -> None:
        self._policy.save(folder)
        inner = folder / "trainer"
        inner.mkdir()
        self._learner.save(inner / "optimizer.safetensors")
        self._collector.save(inner / AHEAD)
        (inner / "config.yaml").write_text(redact(dump(self._config)))
        state = {
            "run_id": self._tracker.run_id,
            "optimizer_step": self._learner.step,
            "kl_coef": self._learner.kl_coef,
            "progress": asdict(self.progress),
        }
        (inner / "state.json").write_text(json.dumps(state, indent=1))

    def _track_iteration(
        self, version: int, collected: Collected, metrics: dict[str, float], phases: Phases, start: float
    ) -> None:
        if not self._processes.is_first:
            return
        seconds = time.perf_counter() - start
        sampled = rollout_metrics.tokens(collected.sampled)
        perf = {f"seconds_{phase}": spent for phase, spent in phases.seconds.items()}
        perf |= {"seconds_iteration": seconds, "tokens_per_sec": sampled / seconds}
        perf["generated_tokens_per_sec"] = sampled / phases.seconds["generate"]
        perf |= self._collector.metrics(self._evaluator)
        perf["trained_tokens_per_sec"] = metrics.pop("tokens_trained") / phases.seconds["update"]
        perf |= self._meter.metrics(collected.groups, collected.sampled, phases.seconds, seconds)
        values = {f"train/{name}": value for name, value in metrics.items()}
        self._tracker.metrics(values | {f"perf/{name}": value for name, value in perf.items()}, version)
        self._tracker.text(
            f"metrics/train_{name_of(version)}.json", json.dumps({"iteration": version, **metrics, **perf}, indent=1)
        )
        if self._config.tracking.rollouts:
            rollout_files.write(self._tracker.run_dir / f"rollouts/{name_of(version)}.jsonl", collected.groups)
            self._tracker.publish(f"rollouts/{name_of(version)}.jsonl")
        self._console.say(
            f"iter {version:>4}  reward {metrics['reward_mean']:.3f}  solved {metrics['success_rate']:.3f}  "
            f"flat {metrics['flat_group_frac']:.2f}  entropy {metrics.get('entropy_mean', math.nan):.3f}  "
            f"grad {metrics['grad_norm']:.2f}  len {metrics['completion_length_mean']:.1f}  "
            f"{seconds:.2f}s (generate {phases.seconds['generate']:.2f}, update {phases.seconds['update']:.2f})"
        )
        live = {"reward": f"{metrics['reward_mean']:.3f}"}
        if self.progress.last_rates:
            live["pass@1"] = f"{mean(self.progress.last_rates):.3f}"
        self._console.advance(version + 1, live)
