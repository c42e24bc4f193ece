"""How often does a study of equal models say that its winner is better? A simulation of the confirmation.

    python -m benchmarks.null_studies --output benchmarks/results/null_studies.json    # a few minutes on one core

All finalists and the own settings are one and the same model: on each problem all have the same success probability,
Beta(rate, 1 - rate). Only the draws differ. They are ranked, and the first two and the own settings measured again, as
in a study (search/confirm.py). `sets` = 1 is what ranking and comparing on the same problems would give.

    own, second   share of studies whose winner is `better` than the own settings, than the second: nominally .025, as
                  the interval of 95% leaves on one side; with the upper end of the 95% interval of the share. Where the
                  own settings win, they are only compared with the second
    coverage      share of studies in which the winner's interval holds the rate
    bias          mean of the winner's score less the rate
    advantage     mean of the winner's reported advantages, over the own settings and over the second
    held          share of these advantages whose interval holds 0
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from optuna.trial import FrozenTrial, TrialState, create_trial

from grpo_mlflow.algorithm.statistics import Estimate, mean, paired_difference, rate_interval, verdict
from grpo_mlflow.search.confirm import Finalist, chosen_and_measured

RATE = 0.6
_Known = dict[tuple[int, int], Finalist]


@dataclass(frozen=True, slots=True)
class Row:
    """The outcome for one number of finalists."""

    finalists: int
    sets: int
    studies: int
    own: float
    own_upper: float
    second: float
    second_upper: float
    coverage: float
    bias: float
    advantage: float
    held: float


def simulate(finalists: int, studies: int, seed: int, *, problems: int = 64, replicates: int = 4, sets: int = 2) -> Row:
    """Simulate studies of equal models."""
    rng = np.random.default_rng(seed)
    trials = [create_trial(state=TrialState.COMPLETE, value=0.0) for _ in range(finalists + 1)]
    for number, trial in enumerate(trials):
        trial.number = number
    scores: list[Estimate] = []
    gaps: dict[str, list[Estimate]] = {"own": [], "second": []}
    for _ in range(studies):
        hard = rng.beta(RATE, 1 - RATE, size=(sets, problems))
        known: dict[tuple[int, int], Finalist] = {}

        def measure(trial: FrozenTrial, block: int, hard: np.ndarray = hard, known: _Known = known) -> Finalist:
            place = trial.number, min(block, sets - 1)
            if place not in known:
                rates = (rng.binomial(replicates, hard[place[1]]) / replicates).tolist()
                known[place] = Finalist(trial, rate_interval(rates, replicates), tuple(rates), replicates)
            return known[place]

        found, own = chosen_and_measured(trials[:-1], measure, trials[-1])
        others = {"own": own, "second": found[1] if len(found) > 1 else None}
        scores.append(found[0].confirmed)
        for name, other in others.items():
            if other is not None and other.trial.number != found[0].trial.number:
                gaps[name].append(paired_difference(found[0].rates, other.rates))
    better = [sum(verdict(gap) == "better" for gap in each) for each in gaps.values()]
    own_share, second_share = (rate_interval([1.0] * n + [0.0] * (studies - n), 1) for n in better)
    every = [*gaps["own"], *gaps["second"]]
    shares = (
        *(own_share.value, own_share.high, second_share.value, second_share.high),
        mean([float(score.low <= RATE <= score.high) for score in scores]),
        mean([score.value - RATE for score in scores]),
        mean([gap.value for gap in every]),
        mean([float(gap.low <= 0 <= gap.high) for gap in every]),
    )
    return Row(finalists, sets, studies, *(round(share, 4) for share in shares))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--finalists", type=int, nargs="+", default=[1, 3, 5, 10])
    parser.add_argument("--studies", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = []
    for sets in (2, 1):
        for finalists in options.finalists:
            rows.append(simulate(finalists, options.studies, options.seed, sets=sets))
            print(rows[-1], flush=True)
    if options.output:
        options.output.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
