"""Do the 95% intervals hold? Simulated evaluations of problems from a known population.

    python -m benchmarks.coverage --output benchmarks/results/coverage.json     # a few minutes on one core
    python -m benchmarks.coverage --studies 200 --problems 8 64

An evaluation draws n problems, each with a success probability from a family, and answers each `replicates` times:

    equal       every problem has the same probability
    solved      a problem is solved always or never
    beta_C      probabilities are Beta(rate * C, (1 - rate) * C); small C is near `solved`, large C near `equal`

Of each evaluation come pass@1, pass@2 and pass@replicates; and mean@1, for rewards of 0.9 for success and 0.1 for form
(of 95% of the answers), `mean@1`, and of -1 and +1, a range that the task declares, `mean@1_signed`. A paired
difference is between two evaluations of the same problems:

    rates       the families above with one rate each, drawn for each problem independently
    nested      as `solved`, where the better model solves all that the other does: no losses
    broken      beta_1 before; after, a share of the problems has 1 - q in place of q, the others are as before

A cell is narrow if its coverage is below 93% by more than two standard errors of the simulation. The table also has the
mean width, and its ratio to that of intervals which hold for many problems only: Wilson's at the effective sample
size, and Student's t for rewards and differences.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from grpo_mlflow.algorithm import intervals
from grpo_mlflow.algorithm.statistics import pass_at_k, t_quantile

Array = NDArray[np.float64]
PROBLEMS, REPLICATES = (2, 4, 8, 16, 64, 512), (1, 2, 4, 8)
RATES = (0.001, 0.003, 0.01, 0.05, 0.2, 0.5, 0.8, 0.95, 0.99, 0.997, 0.999)
FAMILIES = ("equal", "solved", "beta_0.3", "beta_1", "beta_5")
PAIRS = (
    *((0.001, 0.001), (0.5, 0.5), (0.95, 0.95), (0.999, 0.999), (0.001, 0.01), (0.05, 0.01), (0.2, 0.1), (0.5, 0.6)),
    *((0.9, 0.95), (0.97, 0.99), (0.999, 0.99), (0.1, 0.9), (0.001, 0.999)),
)
BROKEN = ((0.5, 0.05), (0.95, 0.01), (0.95, 0.05), (0.99, 0.2), (0.05, 0.05))
WANTED = 0.93


@dataclass(frozen=True, slots=True)
class Cell:
    """A setting of the simulation; `rate` is that of success, of two models for a difference."""

    quantity: str
    family: str
    problems: int
    replicates: int
    rate: tuple[float, ...]
    coverage: float
    width: float
    asymptotic: float  # the mean width of an interval that holds for many problems
    studies: int

    @property
    def is_narrow(self) -> bool:
        return self.coverage + 2 * math.sqrt(WANTED * (1 - WANTED) / self.studies) < WANTED


def probabilities(rng: np.random.Generator, family: str, rate: float, shape: tuple[int, int]) -> Array:
    """Return the success probability of every problem of every evaluation."""
    if family == "equal":
        return np.full(shape, rate)
    if family == "solved":
        return (rng.random(shape) < rate).astype(np.float64)
    total = float(family.removeprefix("beta_"))
    return rng.beta(rate * total, (1 - rate) * total, shape)


def true_pass(family: str, rate: float, k: int) -> float:
    """Return pass@k of the population."""
    if family == "equal":
        return 1 - (1 - rate) ** k
    if family == "solved":
        return rate
    total = float(family.removeprefix("beta_"))
    failing = [((1 - rate) * total + i) / (total + i) for i in range(k)]
    return 1 - math.prod(failing)


def one_model(rng: np.random.Generator, n: int, replicates: int, studies: int) -> Iterator[Cell]:
    """Simulate evaluations of one model at every rate of every family."""
    for family in FAMILIES:
        for rate in RATES:
            q = probabilities(rng, family, rate, (studies, n))
            solved = rng.binomial(replicates, q)
            for k in sorted({1, min(2, replicates), replicates}):
                table = np.array([pass_at_k(c, replicates, k) for c in range(replicates + 1)])
                truth, rates = true_pass(family, rate, k), table[solved]
                found = intervals.of_rates(rates, replicates / k)
                yield _cell(f"pass@{k}", family, (n, replicates), (rate,), truth, found, _wilson(rates))
            formed = solved + rng.binomial(replicates - solved, 0.95)
            values = (0.9 * solved + 0.1 * formed) / replicates
            truth = 0.9 * rate + 0.1 * (rate + 0.95 * (1 - rate))
            found = intervals.of_rewards(values, replicates, (0.0, 1.0), 0.0, 1.0)
            yield _cell("mean@1", family, (n, replicates), (rate,), truth, found, _student(values))
            values = 2.0 * solved / replicates - 1
            found = intervals.of_rewards(values, replicates, (-1.0, 1.0), -1.0, 1.0)
            yield _cell("mean@1_signed", family, (n, replicates), (rate,), 2 * rate - 1, found, _student(values))


def two_models(rng: np.random.Generator, n: int, replicates: int, studies: int) -> Iterator[Cell]:
    """Simulate paired differences, after minus before."""
    shape = studies, n
    for family in (*FAMILIES, "nested"):
        for rates in PAIRS:
            if family == "nested":
                hard = rng.random(shape)
                before, after = ((hard < rate).astype(np.float64) for rate in rates)
            else:
                before, after = (probabilities(rng, family, rate, shape) for rate in rates)
            yield _difference(rng, family, replicates, rates, (before, after), rates[1] - rates[0])
    for rate, share in BROKEN:
        before = probabilities(rng, "beta_1", rate, shape)
        after = np.where(rng.random(shape) < share, 1 - before, before)
        truth = share * (1 - 2 * rate)
        yield _difference(rng, "broken", replicates, (rate, share), (before, after), truth)


def _difference(
    rng: np.random.Generator,
    family: str,
    replicates: int,
    rate: tuple[float, ...],
    q: tuple[Array, Array],
    truth: float,
) -> Cell:
    before, after = (rng.binomial(replicates, each) / replicates for each in q)
    differences = after - before
    found, sizes = intervals.of_differences(differences), (before.shape[1], replicates)
    return _cell("difference", family, sizes, rate, truth, found, _student(differences))


def _cell(
    quantity: str,
    family: str,
    sizes: tuple[int, int],
    rate: tuple[float, ...],
    truth: float,
    found: intervals.Bounds,
    asymptotic: Array,
) -> Cell:
    _, low, high = found
    covered = float(np.mean((low <= truth + 1e-9) & (truth - 1e-9 <= high)))
    widths = float((high - low).mean()), float(asymptotic.mean())
    return Cell(quantity, family, *sizes, rate, round(covered, 4), *widths, len(low))


def _student(values: Array) -> Array:
    """Return the width of Student's t interval."""
    n = values.shape[-1]
    return np.asarray(2 * t_quantile(0.975, n - 1) * values.std(axis=-1, ddof=1) / math.sqrt(n))


def _wilson(rates: Array) -> Array:
    """Return the width of Wilson's interval at the effective sample size."""
    n, p, z = rates.shape[-1], rates.mean(axis=-1), 1.959964
    spread, error = p * (1 - p), rates.var(axis=-1, ddof=1) / n
    size = np.where(error > 0, np.maximum(n, spread / np.where(error > 0, error, 1.0)), n)
    return np.asarray(2 * z / (1 + z * z / size) * np.sqrt(spread / size + z * z / (4 * size * size)))


def simulate(problems: list[int], replicates: list[int], studies: int, seed: int) -> list[Cell]:
    rng = np.random.default_rng(seed)
    sizes = [(n, m) for n in problems for m in replicates]
    return [cell for n, m in sizes for way in (one_model, two_models) for cell in way(rng, n, m, studies)]


def summary(cells: list[Cell]) -> list[str]:
    """Return a line per quantity and number of problems, then one per narrow cell."""
    lines = ["| quantity | problems | lowest | mean | narrow | above 97% | width, asymptotic = 1 |", "|" + " --- |" * 7]
    for quantity in dict.fromkeys(cell.quantity for cell in cells):
        for n in dict.fromkeys(cell.problems for cell in cells):
            own = [cell for cell in cells if (cell.quantity, cell.problems) == (quantity, n)]
            if own:
                found = np.array([cell.coverage for cell in own])
                ratio = np.median([cell.width / cell.asymptotic for cell in own if cell.asymptotic > 0])
                narrow = sum(cell.is_narrow for cell in own)
                above = float(np.mean(found > 0.97))
                row = (quantity, n, f"{found.min():.3f}", f"{found.mean():.3f}", f"{narrow} of {len(own)}")
                lines.append("| " + " | ".join(map(str, (*row, f"{above:.0%}", f"{ratio:.2f}"))) + " |")
    return lines + [f"narrow: {cell}" for cell in cells if cell.is_narrow]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, nargs="+", default=list(PROBLEMS))
    parser.add_argument("--replicates", type=int, nargs="+", default=list(REPLICATES))
    parser.add_argument("--studies", type=int, default=1000, help="evaluations per cell")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    cells = simulate(options.problems, options.replicates, options.studies, options.seed)
    lines = summary(cells)
    print("\n".join(lines))
    if options.output:
        named = [
            {**asdict(cell), "width": round(cell.width, 5), "asymptotic": round(cell.asymptotic, 5)} for cell in cells
        ]
        settings = {"studies": options.studies, "seed": options.seed}
        rows = ",\n".join(json.dumps(each) for each in named)
        options.output.write_text(
            f'{{"settings": {json.dumps(settings)}, "summary": {json.dumps(lines, indent=1)}, "cells": [\n{rows}\n]}}\n'
        )


if __name__ == "__main__":
    main()
