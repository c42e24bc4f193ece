"""The process of the user's functions: it ends with the run, however that ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_mlflow.runtime.functions import Batch, FunctionFailed, functions
from tests.support.waiting import wait_for

RUN = """
import sys, time
from grpo_mlflow.runtime.functions import Batch, functions
made = functions(sys.argv[1], {"f": "f"}, {})
made.begin(Batch({"completions": ["a"]}, {}, 60.0))
time.sleep(float(sys.argv[2]))
"""
HANGS = """
import os, pathlib
def f(**kwargs):
    pathlib.Path(__file__).with_name("pid").write_text(str(os.getpid()))
    while True:
        pass
"""


@pytest.mark.parametrize("killed", [True, False])
def test_a_function_that_hangs_ends_with_the_run(killed: bool, tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text(HANGS)
    words = [sys.executable, "-c", RUN, str(tmp_path / "hangs.py"), "60" if killed else "1"]
    run = subprocess.Popen(words)
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    pid = int((tmp_path / "pid").read_text())
    if killed:
        run.kill()
    run.wait()
    wait_for(lambda: not os.path.exists(f"/proc/{pid}"))


def test_a_process_is_used_again_until_its_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("import os\ndef f(**kwargs): return [os.getpid()]\n")

    def pid() -> float | None:
        return (
            functions(str(path), {"f": "f"}, {}).begin(Batch({"completions": ["a"]}, {}, 20.0)).result().values["f"][0]
        )

    first = pid()
    assert pid() == first
    path.write_text("def f(**kwargs): raise KeyError('new')\n")
    os.utime(path, (1, 1))
    with pytest.raises(FunctionFailed, match="KeyError"):
        pid()


def test_a_function_does_not_get_the_signals_of_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "group.py").write_text("import os\ndef f(**kwargs): return [os.getpgid(0) == os.getpid()]\n")
    made = functions(str(tmp_path / "group.py"), {"f": "f"}, {})
    assert made.begin(Batch({"completions": ["a"]}, {}, 20.0)).result().values == {"f": [1.0]}
