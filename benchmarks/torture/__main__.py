"""Does anything get lost when a run or a study is killed? Does any input end in a traceback?

    python -m benchmarks.torture                       # 84 kills, three at each point, and six outages of a minute
    python -m benchmarks.torture --cases 500           # goes on where the last call has ended
    python -m benchmarks.torture --only 'study: registration' --cases 20 --outages 0
    python -m benchmarks.torture --cases 0 --outages 0 --mutations 20000 --texts 100000 --long 10000

Real runs and studies of a model of a few thousand parameters are killed at named points, or meet a full disk, are gone
on with, and compared with an undisturbed one: every point of every curve, files, checkpoints, tags, status. Command
lines and config files are changed at random, and texts that no model should write are judged by all tasks. Each case is
a line of the results file, to which every call adds; its seed and number draw all that is random in it. The folder of a
case that is not as it should be is kept, with what its processes said.
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
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.torture.cases import Cases
    from benchmarks.torture.points import Point
    from benchmarks.torture.records import Record

os.environ.setdefault("OMP_NUM_THREADS", "1")  # what forks must have no threads


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=84, help="how many further cases")
    parser.add_argument("--seed", type=int, default=0, help="draws the moments and signals")
    parser.add_argument("--only", default="", help="points whose names match this expression")
    parser.add_argument("--outages", type=int, default=6, help="how many outages of MLflow afterwards")
    parser.add_argument("--mutations", type=int, default=0, help="how many command lines and config files afterwards")
    parser.add_argument("--texts", type=int, default=0, help="how many hostile texts afterwards, over all tasks")
    parser.add_argument("--long", type=int, default=0, help="a run of so many iterations with stub phases afterwards")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after so long")
    parser.add_argument("--output", type=Path, default=Path("build/torture"), help="folder of results.jsonl")
    given = parser.parse_args()
    if given.texts and not os.environ.get("PYTHONHASHSEED", "random").isdigit():  # which some tasks need
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "PYTHONHASHSEED": "0"})
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
        if given.cases or given.outages:
            cases.warm(sorted({point.work for point in points})[-1:])
        for record in _records(cases, points, len(lines), given):
            with results.open("a") as stream:
                stream.write(json.dumps(dataclasses.asdict(record)) + "\n")
            found = record.wrong + record.differences
            bad += bool(found)
            said = f"{record.number:>5}  {record.point:28} {record.signal:8} {record.codes!s:16} {record.seconds:5.1f}s"
            figures = [f"{name} {value:g}" for name, value in record.figures.items()]
            print(said, *figures, "" if record.struck else "not reached", *(found[:3]), flush=True)
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
    _table(results)
    return int(bad > 0)


def _records(cases: Cases, points: list[Point], first: int, given: argparse.Namespace) -> Iterator[Record]:
    """Yield the cases of this call, as they end."""
    began, number = time.monotonic(), first
    for make in _makers(cases, points, given):
        if time.monotonic() - began > given.seconds:
            return
        yield make(number)
        number += 1


def _makers(cases: Cases, points: list[Point], given: argparse.Namespace) -> Iterator[Callable[[int], Record]]:
    """Yield what makes each case of this call out of its number."""
    from benchmarks.torture import long, mutations, outages, texts

    for _ in range(given.cases):
        yield lambda number: cases.run(number, points[number % len(points)])
    for _ in range(given.outages):
        yield lambda number: outages.run(cases, number, outages.OUTAGES[number % len(outages.OUTAGES)])
    for start in range(0, given.mutations, mutations.AT_ONCE):
        yield partial(_mutations, cases, min(mutations.AT_ONCE, given.mutations - start))
    names = texts.names() if given.texts else []
    for name in names:
        yield partial(_texts, cases, name, -(-given.texts // len(names)))
    if given.long:
        yield lambda number: long.run(cases.folder, number, given.long)


def _mutations(cases: Cases, count: int, number: int) -> Record:
    from benchmarks.torture import mutations

    return mutations.run(cases.folder, number, cases.seed, count)


def _texts(cases: Cases, name: str, count: int, number: int) -> Record:
    from benchmarks.torture import texts

    return texts.run(cases.folder, number, cases.seed, name, count)


def _table(results: Path) -> None:
    """Print all cases so far by point."""
    records = [json.loads(line) for line in results.read_text().splitlines()]
    struck, wrong = Counter[str](), Counter[str]()
    for each in records:
        name = each["point"] if not each["point"].startswith("texts: ") else "texts"
        struck[name] += each.get("count", 1) * each["struck"]
        wrong[name] += len(each["wrong"]) if each.get("count", 1) > 1 else bool(each["wrong"] or each["differences"])
    print(f"\n{'point':30}{'struck':>8}{'not as it should be':>22}")
    for name in sorted(struck):
        print(f"{name:30}{struck[name]:>8}{wrong[name]:>22}")


if __name__ == "__main__":
    sys.exit(main())
