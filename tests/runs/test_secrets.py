"""Secrets planted in every place where a user may put one are found nowhere: no store, artifact, output or process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from grpo_mlflow import redaction
from grpo_mlflow.config import ServerConfig
from grpo_mlflow.generation.server.launch import Launch
from grpo_mlflow.generation.server.process import ServerProcess
from tests.support.paths import ROOT
from tests.support.small_runs import SMALL
from tests.support.stub_server import STUB, stub

MARK = "pl4nted"
ENVIRONMENT = {
    "OPENAI_API_KEY": f"{MARK}-openai-9aX7",
    "HF_TOKEN": f"{MARK}-hf-9aX7",
    "MLFLOW_TRACKING_PASSWORD": f"{MARK}-mlflow-9aX7",
    "PGPASSWORD": f"{MARK}-postgres-9aX7",
    "http_proxy": f"http://me:{MARK}-proxy-9aX7@127.0.0.1:9",
    "PLANTED": f"{MARK}-reference-9aX7",
}
WORDS = (
    f"generation.base_url=http://me:{MARK}-user'@ 9aX7@host:1/v1",
    f"eval.base_url=https://host/{MARK}0123456789abcdef/v1?api_key={MARK}-query-9aX7",
    f"generation.server.arguments=[--api-key, {MARK}-option-9aX7, --hf-token={MARK}-token-9aX7]",
    f"data.settings={{api_key: {MARK}-setting-9aX7, judge: {{password: '${{ENV:PLANTED}}'}}}}",
)
AWAY = f"http://me:{MARK}-pw9aX7@127.0.0.1:9/{MARK}0123456789abcdef"
TASK = """
from grpo_mlflow.tasks import Arithmetic

class Secretive(Arithmetic):
    def __init__(self, api_key, judge):
        super().__init__(digits=1)
        print("the task was given", api_key, judge)
"""


def run(folder: Path, command: str, *words: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}  # not another's store
    environment = {**own, **ENVIRONMENT, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "HF_HUB_OFFLINE": "1"}
    line = [
        sys.executable,
        "-m",
        "grpo_mlflow",
        command,
        *SMALL,
        "train.iterations=2",
        "checkpoint.keep_last=9",
        *words,
    ]
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)


def leaks(folder: Path, *outputs: subprocess.CompletedProcess[str]) -> list[str]:
    files = [str(path) for path in folder.rglob("*") if path.is_file() and MARK.encode() in path.read_bytes()]
    return files + [line for done in outputs for line in (done.stdout + done.stderr).splitlines() if MARK in line]


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A folder to run in, with a task that is given secrets. Its own files hold none."""
    (tmp_path / "secretive.py").write_text(TASK)
    return tmp_path


def test_a_run_and_what_it_leaves_hold_none(planted: Path) -> None:
    done = run(planted, "train", "data.task=python:secretive:Secretive", *WORDS)
    assert done.returncode == 0, done.stderr
    assert "the task was given *** " in done.stdout
    stored = next(planted.rglob("resolved.yaml")).read_text()
    assert "password: ${ENV:PLANTED}" in stored
    assert not leaks(planted, done)
    shown = run(planted, "train", "data.task=python:secretive:Secretive", *WORDS, "--print-config")
    assert shown.returncode == 0
    assert not leaks(planted, shown)


def test_a_study_and_its_storage_hold_none(planted: Path) -> None:
    words = ("data.task=python:secretive:Secretive", *WORDS, "search.n_trials=2", "search.storage=sqlite:///study.db")
    done = run(planted, "optimize", "--space", "train.lr=[1e-4,1e-3]", "--sampler", "grid", *words)
    assert done.returncode == 0, done.stderr
    assert (planted / "study.db").is_file()
    assert not leaks(planted, done)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train", [f"tracking.uri=http://me:{MARK}-pw9aX7@127.0.0.1:9/?token={MARK}-token9aX7"]),
        (
            "optimize",
            [f"search.storage=postgresql://me:{MARK}%40pw9aX7@127.0.0.1:9/db", "--space", "train.lr=[1e-4,1e-3]"],
        ),
        ("train", [f"trackng.uri=postgresql://me:{MARK}-pw9aX7@127.0.0.1:9/db"]),
        ("train", [f"generation.api_key={MARK}-pw9aX7"]),
        ("train", [f"data.settings={{api_key: {MARK}-pw9aX7"]),
        ("train", ["--overrides", f"data.settings={{api_key: '{MARK}-pw9aX7"]),
        ("train", [f"model.train_id=https://me:{MARK}-pw9aX7@host/model"]),
        ("train", ["generation.backend=vllm_server", f"generation.base_url={AWAY}", "generation.retry_seconds=0"]),
    ],
)
def test_what_fails_shows_none(planted: Path, command: str, words: list[str]) -> None:
    done = run(planted, command, *words)
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    assert done.stderr.strip()
    assert not leaks(planted, done)


def test_a_traceback_shows_none(planted: Path) -> None:
    (planted / "secretive.py").write_text(TASK + "        raise RuntimeError(f'with {api_key!r}')\n")
    done = run(planted, "train", "data.task=python:secretive:Secretive", *WORDS)
    assert done.returncode != 0
    assert "with '***'" in done.stderr
    (planted / "secretive.py").unlink()
    assert not leaks(planted, done)


def test_command_line_and_log_of_a_server_of_our_own_show_none(tmp_path: Path) -> None:
    secret = f"{MARK}-server-{os.getpid()}-9aX7"
    talkative = stub(f"stub-{os.getpid()}", "import os\nprint(os.environ['VLLM_API_KEY'], flush=True)\n" + STUB)

    def start(model: str | Path, port: int) -> Launch:
        plain = talkative(model, port)
        command = (*plain.command, "--api-key", secret, f"--hf-token={secret}", "--max-num-seqs", "4")
        return Launch(
            command, plain.environment, plain.install, {"--api-key": "VLLM_API_KEY", "--hf-token": "HF_TOKEN"}
        )

    redaction.learn_from("generation.server.arguments", ["--api-key", secret])
    server = ServerProcess(start, ServerConfig(), tmp_path / "server.log", print)
    server.start("model")
    try:
        lines = [" ".join(each.info["cmdline"] or ()) for each in psutil.process_iter(["cmdline"])]
        assert any("--max-num-seqs 4" in line and f"stub-{os.getpid()}" in line for line in lines)
        assert not [line for line in lines if secret in line]
        assert secret not in server.tail()
    finally:
        server.close()
    assert "***" in server.log.read_text()
    assert secret not in server.log.read_text()
