"""How often does a study of equal models say that its winner is better? A simulation of the confirmation.

    python -m benchmarks.null_studies --output benchmarks/results/null_studies.json    # a few minutes on one core

All finalists and the own settings are one and the same model: on each problem all have the same success probability,
Beta(rate, 1 - rate). Only the draws differ. The finalists are ranked and the first two measured again as in a study
(search/confirm.py); the own settings are measured on the same problems as the winner. "one set" is what ranking and
comparing on the same problems would give.

    own, second   share of studies whose winner is `better` than the own settings, than the second: nominally .025, as
                  the interval of 95% leaves on one side; with the upper end of the 95% interval of the share
    coverage      share of studies in which the winner's interval holds the rate
    bias          mean of the winner's score less the rate
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from optuna.trial import FrozenTrial, TrialState, create_trial

from grpo_mlflow.algorithm.statistics import paired_difference, rate_interval, verdict
from grpo_mlflow.search.confirm import Finalist, Measure, chosen_and_measured

RATE = 0.6


@dataclass(frozen=True, slots=True)
class Row:
    """The outcome for one number of finalists."""

    finalists: int
    way: str
    studies: int
    own: float
    own_upper: float
    second: float
    second_upper: float
    coverage: float
    bias: float


Ranked = Callable[[Sequence[FrozenTrial], Measure], list[Finalist]]


def two_sets(trials: Sequence[FrozenTrial], measure: Measure) -> list[Finalist]:
    """Return the finalists as a study does; the winner's score is of problems that have chosen nothing."""
    return chosen_and_measured(trials, measure)


def one_set(trials: Sequence[FrozenTrial], measure: Measure) -> list[Finalist]:
    """Return the finalists ranked by the score that is reported."""
    return sorted((measure(trial, 0) for trial in trials), key=lambda finalist: -finalist.confirmed.value)


def simulate(
    finalists: int, studies: int, seed: int, *, problems: int = 64, replicates: int = 4, ranked: Ranked = two_sets
) -> Row:
    """Simulate studies of equal models."""
    rng = np.random.default_rng(seed)
    trials = [create_trial(state=TrialState.COMPLETE, value=0.0) for _ in range(finalists)]
    better, covered, bias = {"own": 0, "second": 0}, 0, 0.0
    for _ in range(studies):
        hard = rng.beta(RATE, 1 - RATE, size=(2, problems))

        def measure(trial: FrozenTrial, block: int, hard: np.ndarray = hard) -> Finalist:
            rates = (rng.binomial(replicates, hard[block]) / replicates).tolist()
            return Finalist(trial, rate_interval(rates, replicates), tuple(rates), replicates)

        found = ranked(trials, measure)
        used = 1 if ranked is two_sets and finalists > 1 else 0
        others = {"own": measure(trials[0], used), **({"second": found[1]} if finalists > 1 else {})}
        for name, other in others.items():
            better[name] += verdict(paired_difference(found[0].rates, other.rates)) == "better"
        interval = found[0].confirmed
        covered += interval.low <= RATE <= interval.high
        bias += (interval.value - RATE) / studies
    own, second = (rate_interval([1.0] * count + [0.0] * (studies - count), 1) for count in better.values())
    shares = (round(end, 4) for end in (own.value, own.high, second.value, second.high, covered / studies, bias))
    return Row(finalists, ranked.__name__, studies, *shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--finalists", type=int, nargs="+", default=[1, 3, 5, 10])
    parser.add_argument("--studies", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = []
    for ranked in (two_sets, one_set):
        for finalists in options.finalists:
            rows.append(simulate(finalists, options.studies, options.seed, ranked=ranked))
            print(rows[-1], flush=True)
    if options.output:
        options.output.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
