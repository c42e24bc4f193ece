"""Every command that ours print works as it is printed, typed in the same folder, and no line is too long."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.small_runs import until
from tests.support.stores import Stores

MODEL = (
    *("model.tiny.hidden_size=16", "model.tiny.layers=1", "model.tiny.heads=1", "model.tiny.steps=1"),
    *("model.tiny.batch_size=2", "model.device=cpu"),
)
SMALL = (
    *MODEL,
    *("train.iterations=2", "train.batch_size=4", "train.lr_warmup_steps=0", "data.problems_per_iteration=2"),
    *("data.rollouts_per_problem=2", "generation.max_new_tokens=4", "eval.num_ids=2", "eval.replicates=2"),
    *("eval.ks=[1,2]", "checkpoint.save_interval=1", "tracking.samples=2"),
)
STUDY = (*SMALL, "search.finalists=1", "search.confirm_num_ids=2", "search.confirm_replicates=2", "--n_trials", "1")
# Judges the first evaluation and two iterations, and fails from then on until somebody takes the cause away.
REWARD = """
from pathlib import Path

calls = []

def flaky(completions, **columns):
    calls.append(1)
    if Path("broken").exists() and len(calls) > 3:
        raise RuntimeError("the disk of the judge is full")
    return [0.0 for _ in completions]
"""
# A terminal on the pipe that is read here.
TERMINAL = """
import io, sys
class Terminal(io.TextIOWrapper):
    def isatty(self):
        return True
sys.stdout = sys.stderr = Terminal(sys.stdout.buffer, line_buffering=True)
from grpo_mlflow.cli.commands import entry
"""
# Runs commands of ours one after the other, each after a line that names it.
DRIVER = f"""{TERMINAL}
import json
from grpo_mlflow.cli.command import complain
from grpo_mlflow.cli.commands import main
from grpo_mlflow.errors import UserError
for words in json.loads(sys.argv[1]):
    print("\\n$", words[0], flush=True)
    try:
        main(words)
    except UserError as error:
        complain(f"error: {{error}}")
"""
COLUMNS = 80
COMMAND = re.compile(r"(?:^|\s{2,}|`)((?:\S*/)?(?:grpo|mlflow|python[\d.]*) [a-z-][^`\n]*)", re.MULTILINE)


def environment() -> dict[str, str]:
    """Return that of a person whose shell finds `grpo`, in the environment of these tests."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "MLFLOW_WORKERS": "1", "COLUMNS": str(COLUMNS)}


def driven(folder: Path, *commands: Sequence[str]) -> str:
    words = [sys.executable, "-c", DRIVER, json.dumps(commands)]
    done = subprocess.run(
        words, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    return shown(done.stdout)


def shown(printed: str) -> str:
    """Return what stays on a terminal: progress bars, here lines like others, are written over."""
    return re.sub(r"^ *([a-z -]+: +\d+%\|.*)?\n", "", printed, flags=re.MULTILINE)


def run_id(printed: str) -> str:
    found = re.search(r"^run +([0-9a-f]{32})$", printed, re.MULTILINE)
    assert found, printed
    return found[1]


def commands(printed: str) -> list[str]:
    return [match[1].strip() for match in COMMAND.finditer(printed)]


def too_long(printed: str) -> list[str]:
    """Return the lines that a terminal would break, but for a path or command that has its line for itself."""
    lines = [line for line in printed.splitlines() if len(line) > COLUMNS]
    return [line for line in lines if " " in line.strip() and not COMMAND.fullmatch(line)]


def stopped(folder: Path) -> str:
    """Return what a run prints that gets Ctrl-C."""
    words = [sys.executable, "-c", f"{TERMINAL}entry()", "train", *SMALL, "train.iterations=150", "eval.interval=150"]
    process = subprocess.Popen(
        words, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    seen = until(process, "iter    2")
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130, rest
    return shown(seen + rest)


def answers(command: str, folder: Path) -> None:
    """Start what stays until it is stopped, and ask it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        ["bash", "-c", command], cwd=folder, env={**environment(), "MLFLOW_PORT": str(port)}, start_new_session=True
    )
    try:
        end = time.monotonic() + 90
        while True:
            try:
                assert urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).status == 200
                return
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, command
                assert time.monotonic() < end, command
                time.sleep(0.5)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)


def works(command: str, folder: Path) -> None:
    if shlex.split(command)[1] == "ui":
        answers(command, folder)
        return
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"


@pytest.mark.slow
def test_every_printed_command_works(empty_stores: Stores, tmp_path: Path) -> None:
    empty_stores.new(tmp_path)
    (tmp_path / "judge.py").write_text(REWARD)
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "{n}?", "answer": "{n}"}}\n' for n in range(40)))
    rows = ["--config", "rows", "model.train_id=tiny", "data.rows.path=rows.jsonl", *SMALL]
    flaky = [*rows, "data.rewards={python:judge.py:flaky: 1}", "train.iterations=4"]
    first = driven(tmp_path, ["train", *SMALL])
    run = run_id(first)
    printed = {"train": first}
    (tmp_path / "broken").touch()
    names = ("evaluate", "optimize", "replay of all", "replay of a part", "failure", "smoke")
    replay = ["train", *SMALL, f"data.source=runs:/{run}"]
    told = driven(
        tmp_path,
        ["evaluate", "--model", run],
        ["optimize", *STUDY],
        replay,
        [*replay, "train.iterations=1"],
        ["train", *flaky],
        ["smoke", *SMALL],  # last: from then on this process knows its store
    )
    printed |= dict(zip(names, re.split(r"^\$ .*$", told, flags=re.MULTILINE)[1:], strict=True))
    printed["stop"] = stopped(tmp_path)
    (tmp_path / "broken").unlink()
    assert {name: lines for name, text in printed.items() if (lines := too_long(text))} == {}
    found = {name: commands(text) for name, text in printed.items()}
    kinds = {name: sorted({" ".join(shlex.split(each)[:2]) for each in each_of}) for name, each_of in found.items()}
    assert kinds["train"] == ["grpo train", "mlflow ui"], printed["train"]
    assert kinds["smoke"] == [], "nothing is left that a command could look at"
    assert kinds["replay of all"] == ["mlflow ui"], printed["replay of all"]
    assert kinds["replay of a part"] == ["grpo train", "mlflow ui"]
    assert kinds["failure"] == kinds["stop"] == ["grpo train"], (printed["failure"], printed["stop"])
    for command in dict.fromkeys(command for each in found.values() for command in each):
        works(command, tmp_path)
