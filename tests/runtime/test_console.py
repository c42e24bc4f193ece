"""What a run says reaches who reads it, and nobody has to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

SAYS = """
import sys
from grpo_mlflow.runtime.console import Console
console = Console()
console.say("first")
sys.stdin.readline()
for number in range(100):
    console.start("training", 10)
    console.say(f"said {number}")
    console.warn(f"warned {number}")
    console.advance(1, {"reward": "1"})
    console.stop()
print("as other code does", flush=True)
print("as other code does", flush=True, file=sys.stderr)
sys.exit(3)
"""


@pytest.mark.parametrize("kept", ["neither", "stdout", "stderr"])
def test_a_run_outlives_those_who_read_it(kept: str, tmp_path: Path) -> None:
    with (tmp_path / "kept").open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", SAYS],
            stdin=subprocess.PIPE,
            stdout=file if kept == "stdout" else subprocess.PIPE,
            stderr=file if kept == "stderr" else subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for reader in (process.stdout, process.stderr):
            if reader is not None:
                reader.close()
        assert process.stdin is not None
        process.stdin.write("go on\n")
        process.stdin.close()
        assert process.wait(30) == 3
    lines = (tmp_path / "kept").read_text().splitlines()
    said = [line for line in lines if not line.startswith("first")]
    word = {"neither": None, "stdout": "said", "stderr": "warning: warned"}[kept]
    assert said == ([f"{word} {number}" for number in range(100)] + ["as other code does"] if word else [])
