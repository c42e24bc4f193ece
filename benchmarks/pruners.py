"""Which pruner ends hopeless trials and spares good ones? A simulation of noisy pass@1 learning curves.

    python -m benchmarks.pruners --output pruners.json            # both families, under a minute on one core
    python -m benchmarks.pruners --family early --seed 1
    python -m benchmarks.pruners --looks 8 --problems 256         # as the preset `tiny` evaluates

What is simulated. A study is a list of trials in random order, as random search proposes them. Trial i has a skill
s_i(t) at evaluation t = 1..looks and solves problem j with probability

    p_ij(t) = sigmoid(s_i(t) - b_j + e_ij),   b_j ~ N(0, 1.5^2),   e_ij ~ N(0, 0.5^2)

b_j is how hard the problem is, for all trials; e_ij is what this trial happens to be good at. The skill rises from a
common start to a final value that is drawn from a spread (so that final pass@1 goes from about .3 to .9):

    s_i(t) = start + (final_i - start) * f_i(t) + w_i(t),   f_i(looks) = 1

Of the trials, 60% rise as 1 - exp(-t / tau) with tau from 5% to 50% of the run, 25% start slowly (a logistic curve; no
worse in the end than others), 15% rise fast and fall again by up to a half. The family says where the middle of the
slow starters' curve is: at 25% to 60% of the run (`late`, the harder one) or at 20% to 45% (`early`). w_i is training
noise, an autoregressive walk with standard deviation 0.08 (up to two points of pass@1). Every evaluation draws
`replicates` answers to each of the same `problems`; a trial's true score is the mean of p_ij(looks) over 20,000
problems, its own part of the walk included.

What is measured, for each pruner, over all repeats:

    wrong    share of the true best 10% of the trials that were pruned
    steps    share of all evaluation steps that were used
    best     true score of the best of the three finished trials that look best, over that of the true best
             (three, because a study measures its finalists again)
    studies with a pruned equal:
      2      studies of one configuration and its equal (the same curve, other draws): one was pruned
      3      studies of one configuration and two equals: one was pruned (a pruner that needs two rivals starts here)
      all    studies of all trials, to which an equal of the best is added: one of the two was pruned, not both

Left out: that a sampler learns from pruned trials, and that the number of finished trials moves the final choice.
"""

from __future__ import annotations

import argparse
import json
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.pruners import BasePruner
from optuna.trial import TrialState

from grpo_mlflow.config import resolve
from grpo_mlflow.search import choices
from grpo_mlflow.search.paired import PairedPruner, rates_key

Array = NDArray[np.float64]
FAMILIES = {"late": (0.25, 0.6), "early": (0.2, 0.45)}
_START, _HARDNESS, _TASTE, _WALK = -1.2, 1.5, 0.5, 0.08


@dataclass(frozen=True, slots=True)
class Study:
    """Measured success rates (trials, looks, problems) and the true final score of each trial."""

    rates: Array
    truth: Array


@dataclass(frozen=True, slots=True)
class Outcome:
    """Which trials were pruned, and how many evaluations were made of each."""

    pruned: NDArray[np.bool_]
    steps: NDArray[np.int64]


def skills(rng: np.random.Generator, trials: int, looks: int, family: str = "late") -> Array:
    """Draw the skill of each trial at each evaluation, (trials, looks)."""
    final = rng.uniform(-0.9, 2.2, trials) - rng.exponential(0.35, trials)
    t = np.arange(1, looks + 1) / looks
    rise = 1 - np.exp(-t / rng.uniform(0.05, 0.5, (trials, 1)))
    middle = rng.uniform(*FAMILIES[family], (trials, 1))
    late = 1 / (1 + np.exp(-(t - middle) / 0.08)) - 1 / (1 + np.exp(middle / 0.08))
    fall = 1 + rng.uniform(0, 1, (trials, 1)) * np.clip(1 - t, 0, 0.5) * 2
    kind = rng.choice(3, size=(trials, 1), p=[0.6, 0.25, 0.15])
    shape = np.where(kind == 1, late, rise)
    shape = shape / shape[:, -1:]
    shape = np.where(kind == 2, shape * fall, shape)
    walk = np.zeros((trials, looks))
    for look in range(looks):
        before = walk[:, look - 1] if look else np.zeros(trials)
        walk[:, look] = 0.8 * before + rng.normal(0, _WALK * 0.6, trials)
    found: Array = _START + (final[:, None] - _START) * shape + walk
    return found


def twins(rng: np.random.Generator, skill: Array, problems: int, replicates: int, equals: int = 1) -> Study:
    """Evaluate trials of which the last `equals` are equals of the first: the same chances, other draws."""
    hardness = rng.normal(0, _HARDNESS, problems)
    tastes = rng.normal(0, _TASTE, (len(skill), problems))
    both = np.concatenate([skill, *[skill[:1]] * equals])
    return Study(
        _rates(rng, both, hardness, np.concatenate([tastes, *[tastes[:1]] * equals]), replicates),
        _truth(both[:, -1]),
    )


def _rates(rng: np.random.Generator, skill: Array, hardness: Array, tastes: Array, replicates: int) -> Array:
    chance = 1 / (1 + np.exp(-(skill[:, :, None] - hardness + tastes[:, None, :])))
    return rng.binomial(replicates, chance) / replicates


def _truth(final: Array) -> Array:
    spread = np.random.default_rng(0).normal(0, np.hypot(_HARDNESS, _TASTE), 20_000)
    return np.array([(1 / (1 + np.exp(-(one + spread)))).mean() for one in final])


def run(study: Study, pruner: BasePruner, order: NDArray[np.int64]) -> Outcome:
    """Run the trials one after another, in the given order, in a real study in memory."""
    running = optuna.create_study(
        study_name=str(zlib.crc32(study.rates.tobytes())),  # hyperband draws brackets by it; the default is random
        direction="maximize",
        pruner=pruner,
        sampler=optuna.samplers.RandomSampler(seed=0),
    )
    count, looks, _ = study.rates.shape
    pruned, steps = np.zeros(count, dtype=bool), np.zeros(count, dtype=np.int64)
    for number in order:
        trial = running.ask()
        for step in range(1, looks + 1):
            rates = study.rates[number, step - 1]
            trial.set_user_attr(rates_key(step), rates)
            trial.report(float(rates.mean()), step)
            steps[number] = step
            if step < looks and trial.should_prune():
                pruned[number] = True
                break
        if pruned[number]:
            running.tell(trial, state=TrialState.PRUNED)
        else:
            running.tell(trial, float(study.rates[number, -1].mean()))
    return Outcome(pruned, steps)


def pruners(looks: int) -> dict[str, Callable[[], BasePruner]]:
    """Return what is compared: the paired pruner without and with a margin, and the others as the package sets them."""
    found: dict[str, Callable[[], BasePruner]] = {
        "paired": lambda: PairedPruner(looks),
        "paired, margin 0.05": lambda: PairedPruner(looks, margin=0.05),
    }
    for name in ("median", "asha", "hyperband", "patient", "none"):
        config = resolve(
            "tiny",
            [f"train.iterations={looks}", "train.lr_warmup_steps=0", "eval.interval=1", f"search.pruner={name}"],
        ).config
        found[name] = lambda c=config: choices.pruner(c)  # type: ignore[misc]
    return found


def compare(
    arguments: argparse.Namespace, family: str, compared: dict[str, Callable[[], BasePruner]]
) -> list[dict[str, Any]]:
    """Run every pruner on the same studies of a family; return one record per pruner."""
    size = (arguments.problems, arguments.replicates)
    top = max(1, round(arguments.trials * 0.1))
    table: list[dict[str, Any]] = []
    for name, make in compared.items():
        began = time.perf_counter()
        wrong, used, best, equal = [], [], [], []
        for repeat in range(arguments.repeats):
            rng = np.random.default_rng([arguments.seed, repeat])
            skill = skills(rng, arguments.trials, arguments.looks, family)
            skill = skill[np.argsort(-_truth(skill[:, -1]))]  # the best first: the equal added below is its
            study = twins(rng, skill, *size)
            order = rng.permutation(arguments.trials)
            done = run(Study(study.rates[:-1], study.truth[:-1]), make(), order)
            wrong.append(done.pruned[:top].mean())
            used.append(done.steps.sum() / (arguments.trials * arguments.looks))
            seen = np.where(done.pruned, -1.0, study.rates[:-1, -1].mean(axis=-1))
            best.append(study.truth[np.argsort(-seen)[:3]].max() / study.truth[0])
            pair = run(study, make(), rng.permutation(arguments.trials + 1)).pruned[[0, -1]]
            equal.append(pair.sum() == 1)
        equals: dict[int, list[bool]] = {2: [], 3: []}
        for count, found in equals.items():
            for repeat in range(arguments.pairs):
                rng = np.random.default_rng([arguments.seed, 10**6 + repeat])
                study = twins(rng, skills(rng, 1, arguments.looks, family), *size, equals=count - 1)
                found.append(bool(run(study, make(), np.arange(count)).pruned.any()))
        table.append(
            {
                "pruner": name,
                "wrong": float(np.mean(wrong)),
                "steps": float(np.mean(used)),
                "best": float(np.mean(best)),
                "equal_2": float(np.mean(equals[2])),
                "equal_3": float(np.mean(equals[3])),
                "equal_all": float(np.mean(equal)),
                "seconds": time.perf_counter() - began,
            }
        )
        print(_line(table[-1]), flush=True)
    return table


_COLUMNS = ("wrong", "steps", "best", "equal_2", "equal_3", "equal_all")


def _line(row: dict[str, Any]) -> str:
    numbers = "  ".join(f"{row[key]:>9.3f}" for key in _COLUMNS)
    return f"{row['pruner']:<32}  {numbers}"


def main() -> None:
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--trials", type=int, default=40, help="trials per study")
    parser.add_argument("--repeats", type=int, default=20, help="studies per pruner")
    parser.add_argument("--pairs", type=int, default=200, help="studies of two equal configurations per pruner")
    parser.add_argument("--looks", type=int, default=20, help="evaluations per trial")
    parser.add_argument("--problems", type=int, default=64, help="evaluation problems")
    parser.add_argument("--replicates", type=int, default=8, help="answers per problem")
    parser.add_argument("--family", choices=[*FAMILIES, "all"], default="all", help="where slow starters rise")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="where to write the table as JSON")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    header = "  ".join(f"{key:>9}" for key in _COLUMNS)
    tables: dict[str, list[dict[str, Any]]] = {}
    for family in FAMILIES if arguments.family == "all" else [arguments.family]:
        print(f"{'family ' + family:<32}  {header}")
        tables[family] = compare(arguments, family, pruners(arguments.looks))
    if arguments.output:
        settings = {key: value for key, value in vars(arguments).items() if key != "output"}
        arguments.output.write_text(json.dumps({"settings": settings, "families": tables}, indent=1) + "\n")


if __name__ == "__main__":
    main()
