"""One iteration as it was: its metrics, its files, its line on the terminal."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from grpo_mlflow.tracking import Tracker
from grpo_mlflow.training import rollout_files, rollout_metrics
from grpo_mlflow.training.checkpoint import name_of
from grpo_mlflow.training.sources import Collected
from grpo_mlflow.training.throughput import Meter


@dataclass(slots=True)
class Phases:
    """Seconds spent in each phase of an iteration."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


@dataclass(frozen=True, slots=True)
class Iteration:
    """What an iteration did.

    `metrics` are those of the update and of the rollouts (`docs/metrics.md`), None where undefined; `phases` are the
    seconds of `generate` and of `update`, `seconds` those of the whole.
    """

    version: int
    collected: Collected
    metrics: Mapping[str, float | None]
    tokens_trained: float
    phases: Mapping[str, float]
    seconds: float

    @property
    def tokens_sampled(self) -> int:
        return rollout_metrics.tokens(self.collected.sampled)

    def perf(self, met: Mapping[str, float], meter: Meter) -> dict[str, float]:
        """Return what the iteration cost, as metrics of `perf/`; `met` is what the generators met."""
        sampled = self.tokens_sampled
        return {
            **{f"seconds_{phase}": spent for phase, spent in self.phases.items()},
            "seconds_iteration": self.seconds,
            "tokens_per_sec": sampled / self.seconds,
            "generated_tokens_per_sec": sampled / self.phases["generate"],
            **met,
            "trained_tokens_per_sec": self.tokens_trained / self.phases["update"],
            **meter.metrics(self.collected.groups, self.collected.sampled, self.phases, self.seconds),
        }

    def line(self) -> str:
        """Return the main figures in one line of at most 80 columns."""
        metrics = self.metrics
        entropy, length = metrics.get("entropy_mean"), metrics["completion_length_mean"] or 0.0
        return (
            f"iter {self.version:>4}  reward {metrics['reward_mean']:.3f}  solved {metrics['success_rate']:.3f}  "
            f"flat {metrics['flat_group_frac']:.2f}  entropy {'-' if entropy is None else f'{entropy:.2f}'}  "
            f"len {length:.{1 if length < 100 else 0}f}  {self.seconds:.{2 if self.seconds < 10 else 0}f}s"
        )


def track(tracker: Tracker, done: Iteration, perf: Mapping[str, float], keep_rollouts: bool) -> None:
    """Log an iteration: metrics, its JSON file, and with `keep_rollouts` the groups that were trained on.

    The file holds every key, with null where there is no finite value; the curves leave such points out.
    """
    name, metrics = name_of(done.version), {key: _finite(value) for key, value in done.metrics.items()}
    values = {f"train/{key}": value for key, value in metrics.items() if value is not None}
    tracker.metrics(values | {f"perf/{key}": value for key, value in perf.items()}, done.version)
    content = {"iteration": done.version, **metrics, **perf}
    tracker.text(f"metrics/train_{name}.json", json.dumps(content, indent=1))
    if keep_rollouts:
        rollout_files.write(tracker.run_dir / f"rollouts/{name}.jsonl", done.collected.groups)
        tracker.publish(f"rollouts/{name}.jsonl")


def _finite(value: float | None) -> float | None:
    """Return None in place of NaN and infinities, which JSON has no words for."""
    return value if value is not None and math.isfinite(value) else None
