"""Does a run whose model is in shards end soon, and resumably, whenever one of its processes is killed?

    python -m benchmarks.kills --cases 20

Each case starts two or three processes, kills one of them at a random moment of evaluation, sampling, update or saving,
and waits for the others; then one process goes on from the last checkpoint. A line per case; the exit code is 0 if all
ended within a minute and went on.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import sys
import tempfile
import time
from pathlib import Path

from tests.support import ranks
from tests.support.small_runs import SMALL, newest

LONG = ("train.iterations=100000", "eval.interval=3", "train.lr_schedule=constant", "train.sharding=full")


def case(number: int, folder: Path) -> tuple[bool, str]:
    """Return whether a case went as it should, and what it was."""
    draw = random.Random(number)
    count = draw.choice((2, 3))
    victim, moment = draw.randrange(count), draw.uniform(0.0, 3.0)
    kind = draw.choice(((), ("model.lora.rank=6",)))
    uri = f"tracking.uri=sqlite:///{folder}/x.db"
    words = (*SMALL, *LONG, *kind, uri, "data.problems_per_iteration=6")
    started = ranks.start(ranks.train, words, folder, count)
    started.wait_for("planned:", seconds=120)
    time.sleep(moment)
    began = time.monotonic()
    started.processes[victim].kill()
    codes = started.end(60)
    seconds = time.monotonic() - began
    ended = None not in codes and all(code for code in codes)
    run = newest(uri.removeprefix("tracking.uri="))
    reached = sorted(folder.glob(f"mlruns/grpo/{run}/artifacts/checkpoints/iter_*/manifest.json"))
    last = int(re.findall(r"iter_(\d+)", str(reached[-1]))[0]) if reached else 0
    again = (f"resume={run}", uri, f"train.iterations={last + 1}", "train.sharding=none")
    resumed = ranks.start(ranks.train, again, folder / "again", 1)
    went_on = resumed.end(120) == [0]
    traces = "Traceback" in started.everything()
    said = f"{number:>3} process {victim} of {count}, {moment:.2f} s{', adapter' if kind else ''}: "
    said += (
        f"ended in {seconds:.1f} s {codes}, resumed at {last}: {'yes' if went_on else 'NO'}; {started.errors()[-1:]}"
    )
    if traces or not went_on:
        said += f"\n{started.everything()[-3000:]}\n{resumed.everything()[-2000:]}"
    return ended and seconds < 60 and went_on and not traces, said


def main() -> int:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args()
    bad = 0
    for number in range(given.first, given.first + given.cases):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "again").mkdir()
            right, said = case(number, Path(folder))
        bad += not right
        print(said, "" if right else "WRONG", flush=True)
    return bool(bad)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
