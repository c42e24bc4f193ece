"""Which pruner ends hopeless trials and spares good ones? A simulation of noisy pass@1 learning curves.

    python -m benchmarks.pruners --output pruners.json            # all families but four for tuning
    python -m benchmarks.pruners --families jump cosine --seed 1
    python -m benchmarks.pruners --looks 8 --problems 256         # as the preset `tiny` evaluates

A study is a list of trials in random order, as random search proposes them, whose curves come from one family
(benchmarks/curves.py). Every evaluation draws `replicates` answers to each of the same `problems`; a trial's true score
is its chance at the end, a mean over 20,000 problems.

What is measured, for each pruner, over all repeats:

    wrong    share of the true best 10% of the trials that were pruned
    steps    share of all evaluation steps that were used
    best     true score of the best of the three finished trials that look best, over that of the true best
             (three, because a study measures its finalists again)

And on pairs, a configuration that finished and its equal (`--pairs`; family `power`), by what the two share:

    draws    the same chances at every step, other answers: what the error of `paired` refers to
    seed     another training seed: another walk, other tastes, and a skill that ends higher or lower by N(0, .1^2) or
             N(0, .2^2), two or four points of pass@1
    behind   share of the pairs in which the second is behind the first by the test of `paired` at two looks in a row
    pruned   share of the pairs in which a pruner ended the second

Left out: that a sampler learns from pruned trials, and that the number of finished trials moves the final choice.
"""

from __future__ import annotations

import argparse
import itertools
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.pruners import BasePruner, WilcoxonPruner
from optuna.trial import TrialState

from benchmarks import curves
from benchmarks.curves import Curves, Study
from grpo_mlflow.config import resolve
from grpo_mlflow.search import choices, decay
from grpo_mlflow.search.paired import UNTRAINED, PairedPruner, rates_key

SEED_EFFECTS = {"draws": None, "seed, .1": 0.1, "seed, .2": 0.2}
Make = Callable[[], BasePruner]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Which trials were pruned, and how many evaluations were made of each."""

    pruned: NDArray[np.bool_]
    steps: NDArray[np.int64]


def run(study: Study, pruner: BasePruner, order: NDArray[np.int64]) -> Outcome:
    """Run the trials one after another, in the given order, in a real study in memory."""
    running = optuna.create_study(
        study_name=str(zlib.crc32(study.rates.tobytes())),  # hyperband draws brackets by it; the default is random
        direction="maximize",
        pruner=pruner,
        sampler=optuna.samplers.RandomSampler(seed=0),
    )
    untied = np.random.default_rng(0)  # with ties, SciPy's Wilcoxon test counts permutations, a thousand times slower
    count, looks, _ = study.rates.shape
    pruned, steps = np.zeros(count, dtype=bool), np.zeros(count, dtype=np.int64)
    for number in order:
        trial = running.ask()
        if isinstance(pruner, PairedPruner):  # the others copy every trial's attributes at every look
            trial.set_user_attr(UNTRAINED, study.untrained.tolist())
            trial.set_user_attr(decay.KEY, curves.learning_rates(study.schedules[number], looks).tolist())
        for step in range(1, looks + 1):
            rates = study.rates[number, step - 1]
            if isinstance(pruner, PairedPruner):
                trial.set_user_attr(rates_key(step), rates)
            trial.report(float(rates.mean()) + 1e-9 * untied.random(), step)
            steps[number] = step
            if step < looks and trial.should_prune():
                pruned[number] = True
                break
        if pruned[number]:
            running.tell(trial, state=TrialState.PRUNED)
        else:
            running.tell(trial, float(study.rates[number, -1].mean()))
    return Outcome(pruned, steps)


def pruners(looks: int) -> dict[str, Make]:
    """Return what is compared: as the package sets them, and Optuna's Wilcoxon pruner with its defaults."""
    found: dict[str, Make] = {}
    for name in ("paired", "median", "asha", "hyperband"):
        config = resolve(
            "tiny",
            [f"train.iterations={looks}", "train.lr_warmup_steps=0", "eval.interval=1", f"search.pruner={name}"],
        ).config
        found[name] = lambda c=config: choices.pruner(c)  # type: ignore[misc]
    found["wilcoxon"] = WilcoxonPruner
    return found


def compare(arguments: argparse.Namespace, family: str, compared: Mapping[str, Make]) -> list[dict[str, Any]]:
    """Run every pruner on the same studies of a family; return one record per pruner."""
    top = max(1, round(arguments.trials * 0.1))
    table: list[dict[str, Any]] = []
    for name, make in compared.items():
        wrong, used, best = [], [], []
        for repeat in range(arguments.repeats):
            rng = np.random.default_rng([arguments.seed, repeat])
            drawn = curves.draw(rng, family, arguments.trials, arguments.looks)
            study = curves.measure(rng, drawn, arguments.problems, arguments.replicates)
            done = run(study, make(), rng.permutation(arguments.trials))
            wrong.append(done.pruned[np.argsort(-study.truth)[:top]].mean())
            used.append(done.steps.sum() / (arguments.trials * arguments.looks))
            seen = np.where(done.pruned, -1.0, study.rates[:, -1].mean(axis=-1))
            best.append(study.truth[np.argsort(-seen)[:3]].max() / study.truth.max())
        record = {
            "pruner": name,
            "repeats": arguments.repeats,
            "wrong": float(np.mean(wrong)),
            "wrong_error": float(np.std(wrong, ddof=1) / np.sqrt(len(wrong))) if len(wrong) > 1 else None,
            "steps": float(np.mean(used)),
            "best": float(np.mean(best)),
        }
        table.append(record)
        print(
            f"  {name:<12} wrong {record['wrong']:.3f}  steps {record['steps']:.3f}  best {record['best']:.3f}",
            flush=True,
        )
    return table


def pair(rng: np.random.Generator, arguments: argparse.Namespace, seed_effect: float | None) -> Study:
    """Draw a configuration and its equal: the same chances (None), or trained under another seed."""
    looks = arguments.looks
    one = curves.draw(rng, "power", 1, looks).skill
    tastes = curves.tastes(rng, 2, arguments.problems)
    if seed_effect is None:
        skill, tastes = np.concatenate([one, one]), np.concatenate([tastes[:1], tastes[:1]])
    else:
        ramp = np.arange(1, looks + 1) / looks
        moved = one + curves.walk(rng, 1, looks) + rng.normal(0, seed_effect) * ramp
        skill = np.concatenate([one + curves.walk(rng, 1, looks), moved])
    return curves.measure(rng, Curves(skill, ("constant",) * 2), arguments.problems, arguments.replicates, tastes)


def is_behind(study: Study) -> bool:
    """Return whether the second trial is behind the first at two looks in a row, by the test of `paired`."""
    looks = study.rates.shape[1]
    pruner = PairedPruner(looks)
    behind = [pruner.upper_bound(study.rates[1, at], study.rates[0, at], looks // 2) < 0 for at in range(looks - 1)]
    return any(one and other for one, other in itertools.pairwise(behind))


def equals(arguments: argparse.Namespace, compared: Mapping[str, Make]) -> dict[str, dict[str, float]]:
    """Return how often the test fires, and how often each pruner ends the second of two equals."""
    found: dict[str, dict[str, float]] = {}
    for kind, effect in SEED_EFFECTS.items():
        rngs = [np.random.default_rng([arguments.seed, 10**6 + repeat]) for repeat in range(arguments.pairs)]
        studies = [pair(rng, arguments, effect) for rng in rngs]
        found[kind] = {"behind": float(np.mean([is_behind(study) for study in studies]))}
        for name, make in compared.items():
            found[kind][name] = float(np.mean([run(study, make(), np.arange(2)).pruned[1] for study in studies]))
        print(f"  {kind:<12} " + "  ".join(f"{name} {share:.3f}" for name, share in found[kind].items()), flush=True)
    return found


def main() -> None:
    summary = (__doc__ or "").splitlines()[0]
    known = (*curves.TUNED, *curves.SEEN, *curves.KEPT_APART)
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--trials", type=int, default=40, help="trials per study")
    parser.add_argument("--repeats", type=int, default=40, help="studies per family and pruner")
    parser.add_argument("--pairs", type=int, default=200, help="pairs of equals per pruner; 0: none")
    parser.add_argument("--looks", type=int, default=20, help="evaluations per trial")
    parser.add_argument("--problems", type=int, default=64, help="evaluation problems")
    parser.add_argument("--replicates", type=int, default=8, help="answers per problem")
    parser.add_argument(
        "--families",
        nargs="+",
        choices=known,
        default=["slow", "linear", *curves.SEEN, *curves.KEPT_APART],
        help="kinds of curves",
    )
    parser.add_argument("--pruners", nargs="+", choices=list(pruners(4)), help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="where to write the tables as JSON")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    compared = {name: make for name, make in pruners(arguments.looks).items() if name in (arguments.pruners or (name,))}
    tables: dict[str, list[dict[str, Any]]] = {}
    for family in arguments.families:
        print(f"family {family}" + (" (kept apart)" if family in curves.KEPT_APART else ""), flush=True)
        tables[family] = compare(arguments, family, compared)
    pairs: dict[str, dict[str, float]] = {}
    if arguments.pairs:
        print("two equals", flush=True)
        pairs = equals(arguments, compared)
    if arguments.output:
        settings = {key: value for key, value in vars(arguments).items() if key not in ("output", "pruners")}
        found = {"settings": settings, "families": tables, "equals": pairs}
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
