"""Where a run stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from grpo_mlflow.algorithm.statistics import mean
from grpo_mlflow.training.evaluation import Evaluation
from grpo_mlflow.training.observations import Watch


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands; saved in every checkpoint.

    `iteration` is the version of the weights; `evaluated` says whether that version was. The rates are pass@1 per
    problem. Version 0 is a candidate for `best_*`, but not for `best_trained_*`, since it is no checkpoint. `seconds`
    of training and `tokens` sampled are counted since the first iteration, over all resumes. `watch` is what the run
    has seen and told.
    """

    iteration: int = 0
    evaluated: bool = False
    seconds: float = 0.0
    tokens: int = 0
    first_rates: tuple[float, ...] = ()
    last_rates: tuple[float, ...] = ()
    best_score: float | None = None
    best_iteration: int = 0
    best_trained_score: float | None = None
    best_trained_iteration: int = 0
    watch: Watch = field(default_factory=Watch)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Progress:
        """Return the progress whose fields were written as JSON, which knows no tuples."""
        rates = {name: tuple(content[name]) for name in ("first_rates", "last_rates")}
        return cls(**{**content, **rates, "watch": Watch(**content.get("watch", {}))})  # older checkpoints have none

    def after_iteration(self, tokens: int, seconds: float) -> Progress:
        """Return the progress after one more iteration, which sampled `tokens` and took `seconds`."""
        return replace(
            self,
            iteration=self.iteration + 1,
            evaluated=False,
            seconds=self.seconds + seconds,
            tokens=self.tokens + tokens,
        )

    def after_evaluation(self, found: Evaluation, seconds: float) -> Progress:
        """Return the progress after an evaluation of the current version, which took `seconds`."""
        rates = tuple(found.success_rates())
        score = mean(rates)
        evaluated = replace(
            self,
            evaluated=True,
            first_rates=self.first_rates or rates,
            last_rates=rates,
            seconds=self.seconds + seconds,
        )
        if self.iteration > 0 and (self.best_trained_score is None or score > self.best_trained_score):
            evaluated = replace(evaluated, best_trained_score=score, best_trained_iteration=self.iteration)
        if self.best_score is None or score > self.best_score:
            return replace(evaluated, best_score=score, best_iteration=self.iteration)
        return evaluated

    def at(self, places: Sequence[int]) -> Progress:
        """Return the progress with the rates of these evaluation seeds only, counted from the first.

        Checkpoints of earlier versions have a rate of every seed, also of those that repeat a problem.
        """
        if not self.first_rates or len(self.first_rates) <= len(places):
            return self
        first, last = (tuple(rates[place] for place in places) for rates in (self.first_rates, self.last_rates))
        return replace(self, first_rates=first, last_rates=last)
