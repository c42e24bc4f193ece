"""What a person should know of a run while there is time to act: a sentence with its remedy for each thing, once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from grpo_mlflow.algorithm.statistics import paired_difference, verdict

# Half of all groups are flat in a healthy run; that 4 of 4 are in 3 iterations in a row then happens once in 4000.
FLAT_ITERATIONS = 3
# Nats per token: the reference finds each token e times less likely. Healthy runs end between .01 and .3.
KL_AWAY = 1.0
# More completions are cut off than end, so most rewards judge a stump.
TRUNCATED = 0.5
# The mean of trainer over sampler probability under the sampler is the probability that the sampler can draw from:
# at most 1, noise aside. top_k and top_p lower it, hardly below a half.
SAMPLER_RATIO = (0.5, 1.1)
# Rare tokens make one iteration's mean noisy; two in a row are no chance.
SAMPLER_ITERATIONS = 2
# By what the 95% interval of the change is stretched. A run looks at many evaluations, and one of them is low by
# chance; 1.5 is about 99.7%. The last evaluation is a single look.
WORSE, WORSE_AT_THE_END = 1.5, 1.0


@dataclass(frozen=True, slots=True)
class Observation:
    """Something seen: its kind, a sentence with the remedy, and for how many iterations in a row before it is told."""

    kind: str
    text: str
    patience: int = 1


@dataclass(frozen=True, slots=True)
class Watch:
    """What a run has told, by kind, and for how many iterations in a row each kind was seen."""

    told: Mapping[str, str] = field(default_factory=dict)
    streaks: Mapping[str, int] = field(default_factory=dict)

    def after_iteration(self, seen: Sequence[Observation], iteration: int) -> Watch:
        """Return the watch after an iteration in which this was seen."""
        streaks = {each.kind: self.streaks.get(each.kind, 0) + 1 for each in seen}
        return Watch(self._telling([each for each in seen if streaks[each.kind] >= each.patience], iteration), streaks)

    def after_evaluation(self, seen: Sequence[Observation], iteration: int) -> Watch:
        """Return the watch after an evaluation in which this was seen."""
        return Watch(self._telling(seen, iteration), self.streaks)

    def news(self, before: Watch) -> list[str]:
        """Return what was not told in the watch before."""
        return [text for kind, text in self.told.items() if kind not in before.told]

    def _telling(self, seen: Sequence[Observation], iteration: int) -> dict[str, str]:
        new = {each.kind: f"iteration {iteration}: {each.text}" for each in seen if each.kind not in self.told}
        return {**self.told, **new}


def of_iteration(metrics: Mapping[str, float | None], own_rollouts: bool = True) -> list[Observation]:
    """Return what the training metrics of one iteration show; a metric that is None or absent shows nothing.

    Without `own_rollouts` the rollouts are another policy's by design, and the ratio to the sampler shows nothing.
    """
    found = [_not_finite(metrics), _flat(metrics), _kl(metrics), _truncated(metrics)]
    found += [_sampler(metrics)] if own_rollouts else []
    return [each for each in found if each is not None]


def of_evaluation(first: Sequence[float], last: Sequence[float], at_the_end: bool) -> list[Observation]:
    """Return what an evaluation shows beside that before training, both as pass@1 of the same problems."""
    change = paired_difference(last, first)
    if verdict(change.stretched(WORSE_AT_THE_END if at_the_end else WORSE)) != "worse":
        return []
    text = (
        f"pass@1 is {-change.value:.3f} [{-change.high:.3f}, {-change.low:.3f}] below that of the model before "
        "training, beyond the noise of problems, so "
        "training does harm: lower train.lr or raise train.kl_coef, and look whether the reward pays for something else"
    )
    return [Observation("worse", text)]


def _not_finite(metrics: Mapping[str, float | None]) -> Observation | None:
    names = [name for name, value in metrics.items() if value is not None and not math.isfinite(value)]
    if not names:
        return None
    text = f"not finite: train/{', train/'.join(names)}; lower train.lr or train.grad_clip, and look at the rollouts"
    return Observation("not_finite", text)


def _flat(metrics: Mapping[str, float | None]) -> Observation | None:
    flat = metrics.get("flat_group_frac_trained", metrics.get("flat_group_frac"))
    if flat != 1:
        return None
    solved = metrics.get("success_rate") or 0.0
    if solved < 0.1:
        remedy = "take easier problems, raise data.rollouts_per_problem, or lower train.lr if they were solved before"
    elif solved > 0.9:
        remedy = "the problems are solved, take harder ones"
    else:
        remedy = "raise data.rollouts_per_problem or generation.temperature"
    text = f"all groups are flat for {FLAT_ITERATIONS} iterations in a row, so nothing is learned: {remedy}"
    return Observation("flat", text, FLAT_ITERATIONS)


def _kl(metrics: Mapping[str, float | None]) -> Observation | None:
    kl = metrics.get("kl_divergence")
    if kl is None or not kl > KL_AWAY:
        return None
    text = (
        f"the KL divergence is {kl:.2f} per token, so the model runs away from its reference: lower train.lr, raise "
        "train.kl_coef, or go on from an earlier checkpoint"
    )
    return Observation("kl", text)


def _truncated(metrics: Mapping[str, float | None]) -> Observation | None:
    truncated = metrics.get("truncated_frac")
    if truncated is None or not truncated > TRUNCATED:
        return None
    text = (
        f"{truncated:.0%} of the completions are cut off: raise generation.max_new_tokens, ask for less in "
        "data.system_prompt, or see whether the model knows how to stop"
    )
    return Observation("truncated", text)


def _sampler(metrics: Mapping[str, float | None]) -> Observation | None:
    ratio, (low, high) = metrics.get("sampler_ratio_mean"), SAMPLER_RATIO
    if ratio is None or low <= ratio <= high:
        return None
    text = (
        f"the trainer finds sampled tokens {ratio:.2f} times as likely as the sampler did, where 1 is right: let a "
        "server return processed log-probs, compute in model.dtype and get every update, or set "
        "generation.behaviour_logprobs=recompute"
    )
    return Observation("sampler_ratio", text, SAMPLER_ITERATIONS)
