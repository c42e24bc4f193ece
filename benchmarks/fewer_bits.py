"""What weights and states in fewer bits save, and what they cost: SmolLM2-135M, each variant against its plan.

    python -m benchmarks.fewer_bits bytes MODEL_FOLDER             # memory by part, measured and planned
    python -m benchmarks.fewer_bits head MODEL_FOLDER              # an output layer in float32: its price
    python -m benchmarks.fewer_bits runs MODEL_FOLDER WORK_FOLDER   # the example of docs/smollm2.md, three seeds each
    python -m benchmarks.fewer_bits report WORK_FOLDER              # outcomes of those runs, paired with float32

`runs` goes on where it was stopped: a run that has ended is not started again, one that was killed is resumed. With
`--only VARIANT` and `--seeds N ...` it does a part. Results are in benchmarks/results/fewer_bits.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/fewer_bits.json"
_ALL, _ADAPTER = (
    ("train.lr=2e-5", "train.iterations=25"),
    ("train.lr=1e-3", "train.iterations=30", "model.lora.rank=16"),
)
# The first of each kind is what the others of it are compared with.
VARIANTS: dict[str, tuple[str, ...]] = {
    "all weights": _ALL,
    "all weights, states in 8 bits": (*_ALL, "train.optimizer=adamw8bit"),
    "all weights, states offloaded": (*_ALL, "train.optimizer_offload=cpu"),
    "adapter": _ADAPTER,
    "adapter, base in bfloat16": (*_ADAPTER, "model.frozen_dtype=bfloat16"),
    "adapter, base in 4 bits": (*_ADAPTER, "model.quantization=nf4"),
}
WITH_REFERENCE: dict[str, tuple[str, ...]] = {
    "all weights, with reference": (*_ALL, "train.kl_coef=0.05"),
    "all weights, reference in bfloat16": (*_ALL, "train.kl_coef=0.05", "model.frozen_dtype=bfloat16"),
}
# glibc would keep freed memory, and a process would look as large as it ever was
_TRIMMED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def _note(section: str, found: Any) -> None:
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({**known, section: found}, indent=1) + "\n")


def _variants() -> dict[str, tuple[str, ...]]:
    return {**VARIANTS, **WITH_REFERENCE}


def measure_bytes(folder: Path) -> None:
    """Measure each variant in a process of its own."""
    found = {}
    for name in _variants():
        words = [sys.executable, "-m", "benchmarks.fewer_bits", "one", str(folder), "--only", name]
        told = subprocess.run(words, env={**os.environ, **_TRIMMED}, capture_output=True, text=True, cwd=ROOT)
        if told.returncode:
            raise SystemExit(told.stderr)
        found[name] = json.loads(told.stdout.splitlines()[-1])
        print(name, json.dumps(found[name]), flush=True)
    _note("bytes", found)
    print(bytes_table(found))


def bytes_table(found: dict[str, dict[str, list[float]]]) -> str:
    """Return MB, measured / planned (error), of each part of each variant."""
    parts = ["model", "reference", "gradients", "optimizer state"]
    lines = [f"| {' | '.join(['', *parts])} |", "| --- " * (len(parts) + 1) + "|"]
    for name, own in found.items():
        cells = []
        for part in parts:
            measured, planned = own.get(part, [0.0, 0.0])
            error = f" ({measured / planned - 1:+.0%})" if planned else ""
            cells.append(f"{measured / 1e6:.1f} / {planned / 1e6:.1f}{error}" if planned else "")
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def _runs(folder: Path, work: Path, names: Sequence[str], seeds: Sequence[int]) -> None:
    work.mkdir(parents=True, exist_ok=True)
    for seed in seeds:  # a seed of every variant, then the next: what is done can be compared at any time
        for name in names:
            log = work / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}.log"
            if outcome(log) is None:
                _run(folder, work, name, seed, log)
            print(name, seed, outcome(log), flush=True)


def _run(folder: Path, work: Path, name: str, seed: int, log: Path) -> None:
    store = f"tracking.uri=sqlite:///{work.absolute()}/mlflow.db"
    label = f"{log.stem}"
    begun = _begun(store, label)
    if begun is None:
        words = [
            "--config",
            "docs/smollm2.yaml",
            f"model.train_id={folder.absolute()}",
            f"seed={seed}",
            *VARIANTS[name],
        ]
        words += ["model.device=cpu", f"tracking.run_name={label}", "checkpoint.keep_last=1"]
    else:
        words = [f"resume={begun}"]
    began = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "docs")])}
    with log.open("a") as stream:
        command = [sys.executable, "-m", "grpo_mlflow", "train", *words, store]
        code = subprocess.run(command, stdout=stream, stderr=stream, cwd=ROOT, env=environment).returncode
        stream.write(f"\nended with {code} after {time.perf_counter() - began:.0f} s\n")
    if code:
        raise SystemExit(f"{name}, seed {seed}: ended with {code}; {log} says why. Start this again to go on.")


def _begun(store: str, label: str) -> str | None:
    """Return the id of a run that was begun under this name."""
    import mlflow

    client = mlflow.MlflowClient(store.partition("=")[2])
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(ids, f"attributes.run_name = '{label}'", max_results=1)
    return found[0].info.run_id if found else None


def outcome(log: Path) -> tuple[float, float] | None:
    """Return held-out pass@1 before and after; None: the run has not ended."""
    text = log.read_text() if log.exists() else ""
    found = re.findall(r"held-out pass@1 +([\d.]+) .*?-> +([\d.]+) ", text)
    return (float(found[-1][0]), float(found[-1][1])) if found else None


def report(work: Path, seeds: Sequence[int]) -> None:
    """Print and note the outcomes, and each variant's difference from the first of its kind, with 95% over seeds."""
    from grpo_mlflow.algorithm.statistics import mean, t_quantile

    kept: dict[str, Any] = {}
    for name in VARIANTS:
        logs = {seed: work / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}.log" for seed in seeds}
        ended = {seed: found[1] for seed, log in logs.items() if (found := outcome(log)) is not None}
        plain = kept.get(name.partition(",")[0], {"pass@1": {}})["pass@1"]
        differences = [value - plain[seed] for seed, value in ended.items() if seed in plain]
        kept[name] = {"pass@1": ended}
        if len(differences) > 1:
            middle = mean(differences)
            spread = sum((each - middle) ** 2 for each in differences) / (len(differences) - 1)
            half = t_quantile(0.975, len(differences) - 1) * (spread / len(differences)) ** 0.5
            kept[name] |= {"difference": [middle, middle - half, middle + half]}
        print(name, json.dumps(kept[name]))
    _note("outcomes", kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("bytes", "head", "runs", "report", "one"))
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--only", help="a variant", choices=(*VARIANTS, *WITH_REFERENCE))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    given = parser.parse_args()
    names = [given.only] if given.only else [*VARIANTS]
    if given.what == "bytes":
        measure_bytes(given.folders[0])
    elif given.what == "runs":
        _runs(given.folders[0], given.folders[1], names, given.seeds)
    elif given.what == "report":
        report(given.folders[0], given.seeds)
    else:
        from benchmarks import fewer_bits_measure  # it imports torch

        if given.what == "one":
            print(json.dumps(fewer_bits_measure.of(given.folders[0], _variants()[given.only])))
        else:
            _note("output layer in float32", fewer_bits_measure.head(given.folders[0]))


if __name__ == "__main__":
    main()
