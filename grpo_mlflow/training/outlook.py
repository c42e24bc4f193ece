"""How much work a run is, before it begins, and how long it will take, once that can be measured."""

from __future__ import annotations

from dataclasses import dataclass

from grpo_mlflow.config import Config
from grpo_mlflow.generation import training_sampling
from grpo_mlflow.runtime.pace import duration
from grpo_mlflow.training.evaluation import evaluation_sampling

_WORTH_TELLING = 60.0  # seconds


@dataclass(frozen=True, slots=True)
class Work:
    """What is left of a run: iterations and evaluations, and the completions that each of them samples."""

    iterations: int
    evaluations: int
    rollouts: int
    measured: int


def work(config: Config, begun: int, *, evaluated: bool = False) -> Work:
    """Return the work after `begun` iterations; `evaluated`: the evaluation that is due then is done already."""
    total, settings = config.train.iterations, config.eval
    due = {step for step in range(begun, total) if step % settings.interval == 0} | {total}
    evaluations = len(due - {begun} if evaluated else due) if settings.enabled else 0
    live = config.data.source == "live"
    return Work(
        total - begun,
        evaluations,
        config.rollouts_per_iteration if live else 0,
        settings.num_ids * (settings.replicates + settings.greedy),
    )


def planned(config: Config, left: Work) -> str:
    """Return the work of a run in words, with the most tokens that it can sample."""
    parts = []
    if left.iterations:
        what = f"of {left.rollouts:,} completions" if left.rollouts else "on rollouts that are kept"
        parts.append(f"{_several(left.iterations, 'iteration')} {what}")
    if left.evaluations:
        parts.append(f"{_several(left.evaluations, 'evaluation')} of {left.measured:,}")
    tokens = left.iterations * left.rollouts * training_sampling(config.generation).max_new_tokens
    tokens += left.evaluations * left.measured * evaluation_sampling(config).max_new_tokens
    return f"planned: {', '.join(parts)}; at most {_rounded(tokens)} tokens" if parts else ""


def planned_study(config: Config, trials: int) -> str:
    """Return the work of a study in words. The model before training is measured once; what varies may change sizes."""
    each = planned(config, work(config, 0, evaluated=True)).removeprefix("planned: ")
    return f"planned: {_several(trials, 'trial')}, each of {each} (a pruned one ends earlier)"


def planned_evaluation(config: Config) -> str:
    """Return the work of one evaluation in words."""
    measured = work(config, 0).measured
    tokens = measured * evaluation_sampling(config).max_new_tokens
    return f"planned: {measured:,} completions of {config.eval.num_ids:,} problems; at most {_rounded(tokens)} tokens"


def expected(left: Work, per_iteration: float, per_evaluation: float) -> str:
    """Return how long the rest will take at the pace so far, in seconds per piece; empty if that is soon."""
    seconds = left.iterations * per_iteration + left.evaluations * per_evaluation
    if seconds < _WORTH_TELLING:
        return ""
    text = f"about {duration(seconds)} left: {_several(left.iterations, 'iteration')} of {duration(per_iteration)}"
    if left.evaluations and per_evaluation > 0:  # else none was timed yet
        text += f", {_several(left.evaluations, 'evaluation')} of {duration(per_evaluation)}"
    return text


def _several(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _rounded(tokens: int) -> str:
    return f"{tokens / 1e6:.1f} million" if tokens >= 1e6 else f"{tokens:,}"
