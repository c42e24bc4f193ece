"""One iteration of ours against one of TRL's GRPOTrainer, on the same models, prompts, rewards and machine.

    make bench                                                       # about half an hour on two cores
    python -m benchmarks.compare_trl --trl_python .venv-bench/bin/python --only 0 1

An iteration samples N prompts x K completions, rewards them, scores them under a frozen reference (kl_coef 0.05) and
takes one optimizer step. Both processes are alive at once and take turns, iteration by iteration, so whatever else the
machine does meets both; the ratio is the median over turns of TRL's seconds over ours, the first turn left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.workloads import WORKLOADS

_ROOT = Path(__file__).resolve().parent.parent


class Side:
    """A process that runs an iteration when told to."""

    def __init__(self, python: str, module: str, arguments: list[str], threads: int) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": str(_ROOT),
            "PYTHONWARNINGS": "ignore",
        }
        self._process = subprocess.Popen(
            [python, "-m", module, *arguments],
            cwd=_ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._expect("ready")

    def _expect(self, word: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(word):
                return line[len(word) :]
        raise SystemExit(f"{self._process.args} ended with {self._process.wait()}")

    def turn(self) -> tuple[float, float]:
        """Return seconds and processor seconds of one iteration."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        wall, cpu = self._expect("done").split()
        return float(wall), float(cpu)

    def end(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.close()
        facts: dict[str, Any] = json.loads(self._expect("facts"))
        self._process.wait()
        return facts


def compare(index: int, folder: Path, trl_python: str, iterations: int, threads: int, dtype: str) -> dict[str, Any]:
    """Run both sides of a workload in turns; return the record of the results file."""
    workload = WORKLOADS[index]
    arguments = [str(index), str(folder), str(threads), str(iterations + 2), dtype]
    trl = Side(trl_python, "benchmarks.trl_side", arguments, threads)
    ours = Side(sys.executable, "benchmarks.our_side", arguments, threads)
    pairs = [(ours.turn(), trl.turn()) for _ in range(iterations + 1)][1:]
    mine, theirs = ours.end(), trl.end()
    seconds, theirs_seconds = (statistics.median(pair[side][0] for pair in pairs) for side in (0, 1))
    floor = sum(mine["useful_gflop"].values()) / mine["peak_gflops"]
    return {
        "workload": workload.name,
        "model": workload.model,
        "prompts": workload.prompts,
        "k": workload.k,
        "max_new_tokens": workload.tokens,
        "dtype": dtype,
        "threads": threads,
        "ours_seconds": seconds,
        "trl_seconds": theirs_seconds,
        "ratio": statistics.median(b[0] / a[0] for a, b in pairs),
        "cpu_ratio": statistics.median(b[1] / a[1] for a, b in pairs),
        "pairs": pairs,
        "ours_rss_mb": mine["rss_mb"],
        "trl_rss_mb": theirs["rss_mb"],
        "ours_mean_length": mine["mean_length"],
        "trl_mean_length": theirs["mean_length"],
        "ours_phases": mine["phases"],
        "ours_tokens_per_second": mine["tokens"] / seconds,
        "floor_seconds": floor,
        "ours_update_utilisation": mine["useful_gflop"]["update"] / mine["peak_gflops"] / mine["phases"]["update"],
        "gemm_gflops": mine["peak_gflops"],
    }


def line(record: dict[str, Any]) -> str:
    phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in record["ours_phases"].items())
    return (
        f"{record['workload']:<46} ours {record['ours_seconds']:7.2f} s  TRL {record['trl_seconds']:7.2f} s  "
        f"ratio {record['ratio']:5.2f} ({record['cpu_ratio']:.2f} in processor time)\n"
        f"{'':<46} {phases}; {record['ours_tokens_per_second']:.0f} tokens/s; floor {record['floor_seconds']:.2f} s at "
        f"{record['gemm_gflops']:.0f} GFLOP/s, update at {record['ours_update_utilisation']:.0%} of it; "
        f"memory {record['ours_rss_mb']:.0f} against {record['trl_rss_mb']:.0f} MB"
    )


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Draw ratios and memory as two rows of bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 1.2 + 0.7 * len(records)), sharey=True)
    names = [record["workload"].replace(", ", ",\n", 1) for record in records]
    for axis, key, title in (
        (axes[0], "seconds", "seconds per iteration (log)"),
        (axes[1], "rss_mb", "peak memory, MB"),
    ):
        for shift, side, color in ((-0.2, "ours", "#1b6ca8"), (0.2, "trl", "#b9b9b9")):
            values = [record[f"{side}_{key}"] for record in records]
            places = [place + shift for place in range(len(records))]
            bars = axis.barh(places, values, height=0.38, color=color, label="grpo_mlflow" if side == "ours" else "TRL")
            axis.bar_label(bars, fmt="%.2f" if key == "seconds" else "%.0f", padding=3, fontsize=8)
        axis.set_xlabel(title)
        axis.margins(x=0.18)
    axes[0].set_xscale("log")
    axes[0].set_yticks(range(len(records)), names, fontsize=8)
    axes[0].invert_yaxis()
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trl_python", default=".venv-bench/bin/python", help="a Python that has TRL")
    parser.add_argument("--models", type=Path, default=_ROOT / "build/bench-models", help="where models are kept")
    parser.add_argument("--only", type=int, nargs="+", default=list(range(len(WORKLOADS))), help="which workloads")
    parser.add_argument("--iterations", type=int, default=5, help="pairs counted, after one that is not")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--output", type=Path, default=_ROOT / "benchmarks/results/compare_trl.json")
    parser.add_argument("--figure", type=Path, default=_ROOT / "docs/images/compare_trl.png")
    arguments = parser.parse_args()
    records = []
    for index in arguments.only:
        folder = arguments.models.absolute() / WORKLOADS[index].model
        if not folder.is_dir():
            command = [arguments.trl_python, "-m", "benchmarks.models", WORKLOADS[index].model, str(folder)]
            subprocess.run(command, cwd=_ROOT, check=True, stderr=subprocess.DEVNULL)
        records.append(
            compare(index, folder, arguments.trl_python, arguments.iterations, arguments.threads, arguments.dtype)
        )
        print(line(records[-1]), flush=True)
        arguments.output.write_text(json.dumps(records, indent=1) + "\n")
    draw(records, arguments.figure)


if __name__ == "__main__":
    main()
