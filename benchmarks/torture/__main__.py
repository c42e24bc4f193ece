"""Does anything get lost when a run or a study is killed?

    python -m benchmarks.torture                       # 84 kills, three at each point
    python -m benchmarks.torture --cases 500           # goes on where the last call has ended
    python -m benchmarks.torture --only 'study: registration' --cases 20

Real runs and studies of a model of a few thousand parameters are killed at named points, or meet a full disk, are gone
on with, and compared with an undisturbed one: every point of every curve, files, checkpoints, status. Each case is a
line of the results file, to which every call adds; its seed and number draw the moment and the signal. The folder of a
case that differs is kept, with what its processes said.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.torture.cases import Cases, Record
    from benchmarks.torture.points import Point

os.environ.setdefault("OMP_NUM_THREADS", "1")  # what forks must have no threads


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=84, help="how many further cases")
    parser.add_argument("--seed", type=int, default=0, help="draws the moments and signals")
    parser.add_argument("--only", default="", help="points whose names match this expression")
    parser.add_argument("--outages", type=int, default=5, help="how many outages of MLflow afterwards")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after so long")
    parser.add_argument("--output", type=Path, default=Path("build/torture"), help="folder of results.jsonl")
    given = parser.parse_args()
    output = given.output.absolute()
    os.environ["GRPO_MLFLOW_CACHE"] = str(output / "cache")
    from benchmarks.torture import artifacts, processes, works
    from benchmarks.torture.cases import Cases
    from benchmarks.torture.points import POINTS

    output.mkdir(parents=True, exist_ok=True)
    processes.wait(processes.fork(output, "make.log", lambda: works.prepare(output)))
    results = output / "results.jsonl"
    lines = results.read_text().splitlines() if results.exists() else []
    points = [point for point in POINTS if re.search(given.only, point.name)]
    server, address = artifacts.start()
    bad = 0
    try:
        cases = Cases(output, address, given.seed)
        cases.warm(sorted({point.work for point in points})[-1:])
        for record in _records(cases, points, len(lines), given):
            with results.open("a") as stream:
                stream.write(json.dumps(dataclasses.asdict(record)) + "\n")
            found = record.wrong + record.differences
            bad += bool(found)
            said = f"{record.number:>5}  {record.point:28} {record.signal:8} {record.codes!s:16} {record.seconds:5.1f}s"
            print(said, "" if record.struck else "not reached", *(found[:3]), flush=True)
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
    _table(results)
    return int(bad > 0)


def _records(cases: Cases, points: list[Point], first: int, given: argparse.Namespace) -> Iterator[Record]:
    """Yield the cases of this call, as they end."""
    from benchmarks.torture import outages

    began = time.monotonic()
    for number in range(first, first + given.cases + given.outages):
        if time.monotonic() - began > given.seconds:
            return
        if number < first + given.cases:
            yield cases.run(number, points[number % len(points)])
        else:
            yield outages.run(cases, number, outages.OUTAGES[number % len(outages.OUTAGES)])


def _table(results: Path) -> None:
    """Print all cases so far by point."""
    records = [json.loads(line) for line in results.read_text().splitlines()]
    struck = Counter(each["point"] for each in records if each["struck"])
    wrong = Counter(each["point"] for each in records if each["wrong"] or each["differences"])
    print(f"\n{'point':30}{'struck':>8}{'not as undisturbed':>20}")
    for name in sorted({each["point"] for each in records}):
        print(f"{name:30}{struck[name]:>8}{wrong[name]:>20}")
    print(f"{'all':30}{sum(struck.values()):>8}{sum(wrong.values()):>20}")


if __name__ == "__main__":
    sys.exit(main())
