"""A server that a run starts itself: it is waited for, watched, started again, and never outlives the run."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from grpo_mlflow import runs
from grpo_mlflow.config import Resolved, ServerConfig, resolve
from grpo_mlflow.errors import ServerFailed, UserError
from grpo_mlflow.generation.server.launch import launch
from grpo_mlflow.generation.server.link import Link
from grpo_mlflow.generation.server.process import ServerProcess
from grpo_mlflow.runtime.http.client import Fault
from tests.support.paths import ROOT
from tests.support.small_runs import SMALL
from tests.support.stub_server import stub


def marked(mark: str) -> list[psutil.Process]:
    """Return the living processes of a stub, without its warden and without us."""
    found = []
    for process in psutil.process_iter():
        try:
            words = " ".join(process.cmdline())
            ours = process.pid != os.getpid() and not any(word in words for word in ("warden.py", "pytest"))
            if mark in words and ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:  # it ended meanwhile
            continue
    return found


def gone(mark: str, seconds: float = 15.0) -> bool:
    end = time.monotonic() + seconds
    while marked(mark) and time.monotonic() < end:
        time.sleep(0.1)
    return not marked(mark)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[str]:
    word = f"mark-{tmp_path.name}-{os.getpid()}"
    yield word
    for process in marked(word):
        process.kill()


def test_it_is_waited_for_and_ends_with_all_its_processes(tmp_path: Path, mark: str) -> None:
    said: list[str] = []
    server = ServerProcess(stub(mark), ServerConfig(), tmp_path / "server.log", said.append)
    server.start("model")
    assert server.alive
    assert len(marked(mark)) == 2
    assert "stub is up" in server.tail()
    assert "ready" in said[-1]
    server.close()
    assert not server.alive
    assert gone(mark)


def test_a_proxy_is_not_asked_whether_it_is_there(tmp_path: Path, mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    server = ServerProcess(stub(mark), ServerConfig(start_seconds=10), tmp_path / "server.log", print)
    server.start("model")
    server.close()


def test_what_a_server_that_died_left_behind_is_ended(tmp_path: Path, mark: str) -> None:
    server = ServerProcess(stub(mark), ServerConfig(), tmp_path / "server.log", print)
    server.start("model")
    parent = next(process for process in marked(mark) if "http.server" in " ".join(process.cmdline()))
    parent.kill()
    assert gone(mark)
    deadline = time.monotonic() + 10
    while server.alive and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not server.alive
    server.start("model")
    assert server.alive
    server.close()


def test_a_server_that_lives_is_not_waited_for(tmp_path: Path, mark: str) -> None:
    """Every request that fails asks: a server that only answers late must not cost a second for each."""
    server = ServerProcess(stub(mark), ServerConfig(), tmp_path / "server.log", print)
    server.start("model")
    began = time.monotonic()
    assert server.ended() is None
    assert time.monotonic() - began < 0.7
    parent = next(process for process in marked(mark) if "http.server" in " ".join(process.cmdline()))
    parent.kill()
    assert "the server ended (by signal 9, SIGKILL)" in str(server.ended())  # at once
    server.close()
    assert server.ended() is None


class Watched:
    """A process of ours that tells how often it was looked at."""

    def __init__(self, ends: str | None) -> None:
        self.ends, self.looks, self.model, self.alive = ends, 0, "model", True

    def ended(self) -> str | None:
        self.looks += 1
        time.sleep(0.2)
        return self.ends

    def start(self, model: str | Path) -> None:
        self.alive = True


class Silent:
    """An engine that has nothing to say."""

    client = SimpleNamespace(root="http://127.0.0.1:9")

    async def connect(self) -> str:
        return ""


def watched(ends: str | None, retry_seconds: float = 0.0) -> tuple[Link, Watched]:
    process, engine = Watched(ends), Silent()
    given: Any = engine, process
    return Link(given[0], 10, retry_seconds, given[1]), process


@pytest.mark.parametrize(("answered", "looks"), [(True, 0), (False, 1)])
def test_requests_that_fail_together_look_once_and_only_if_nobody_answered(answered: bool, looks: int) -> None:
    link, process = watched("the server ended (by signal 9)")

    async def fails() -> None:
        raise Fault("no luck", answered=answered)

    async def ask() -> list[Any]:
        return await asyncio.gather(*(link.ask("sampling", fails) for _ in range(64)), return_exceptions=True)

    found = asyncio.run(ask())
    assert process.looks == looks
    assert {str(error) for error in found} == {
        f"sampling failed: {'no luck' if answered else 'the server ended (by signal 9)'}"
    }


@pytest.mark.parametrize("answered", [False, True])
def test_how_a_server_ended_is_told_once(answered: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Also where its last words were an answer, such as 500, after which it ended."""
    link, process = watched("the server ended (by signal 9)", 20.0)

    async def fails_once() -> str:
        if link.retried:
            return "right"
        process.alive = False
        raise Fault("/v1/completions answers 500", answered=answered)

    assert asyncio.run(link.ask("sampling", fails_once)) == "right"
    assert sum("by signal 9" in record.getMessage() for record in caplog.records) == 1
    assert link.restarts == 1


def test_it_ends_when_the_trainer_is_killed(tmp_path: Path, mark: str) -> None:
    program = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from grpo_mlflow.config import ServerConfig
from grpo_mlflow.generation.server.process import ServerProcess
from tests.support.stub_server import stub
server = ServerProcess(stub({mark!r}), ServerConfig(), Path({str(tmp_path)!r}) / "server.log", print)
server.start("model")
print("ready", flush=True)
time.sleep(600)
"""
    trainer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    while (line := trainer.stdout.readline()) and line.strip() != "ready":
        pass
    assert len([p for p in marked(mark) if p.pid != trainer.pid]) == 2
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    trainer.stdout.close()
    assert gone(mark)


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        ("import sys; sys.exit('no such model')", {}, r"ended while it started \(exit code 1\).*\n.*no such model"),
        (
            "import time; print('loading', flush=True); time.sleep(60)",
            {"start_seconds": 1.0},
            "after 1 s .*start_seconds = 1;.*\nloading",
        ),
    ],
)
def test_a_start_that_fails_says_what_the_log_says(
    tmp_path: Path, mark: str, source: str, settings: dict[str, Any], message: str
) -> None:
    server = ServerProcess(stub(mark, source), ServerConfig(**settings), tmp_path / "server.log", print)
    with pytest.raises(ServerFailed, match=message):
        server.start("model")
    server.close()
    assert gone(mark)


def test_an_interpreter_that_is_not_there_is_named(tmp_path: Path) -> None:
    settings = ServerConfig(python="no/such/python")

    def server(backend: str) -> ServerProcess:
        return ServerProcess(lambda m, p: launch(backend, settings, m, p, "float32"), settings, tmp_path / "log", print)

    with pytest.raises(
        UserError, match=r"generation\.server\.python = 'no/such/python'.*GPU .*pip install vllm.*CPU `make server`"
    ):
        server("vllm_server").start("model")
    with pytest.raises(UserError, match=r"'no/such/python'.*GPU .*pip install sglang"):
        server("sglang_server").start("model")


def test_the_command_says_what_the_settings_say(tmp_path: Path) -> None:
    gpu = ServerConfig(device="cuda:1", memory=0.4, arguments=("--max-model-len", "512"), python="P")
    found = launch("vllm_server", gpu, "org/model", 7, "bfloat16")
    text = " ".join(found.command)
    assert text.startswith("P -m vllm.entrypoints.openai.api_server --model org/model")
    assert "--gpu-memory-utilization 0.4" in text
    assert text.endswith("--max-model-len 512")
    assert "--dtype bfloat16" in text
    assert found.environment["CUDA_VISIBLE_DEVICES"] == "1"
    assert found.environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert "HF_HUB_OFFLINE" not in found.environment
    cpu = launch("vllm_server", ServerConfig(device="cpu", memory=2.0), tmp_path, 7, "float32")
    assert "--enforce-eager" in cpu.command
    assert cpu.environment["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert cpu.environment["HF_HUB_OFFLINE"] == "1"
    other = " ".join(launch("sglang_server", gpu, "org/model", 7, "float32").command)
    assert "-m sglang.launch_server --model-path org/model" in other
    assert "--mem-fraction-static 0.4" in other
    assert "--enable-deterministic-inference" in other


# A whole run with a server of its own


def managed(folder: Path, shared_store: str, dialect: str, *overrides: str) -> Resolved:
    """A config whose server's interpreter is the fake one."""
    program = folder / "python"
    program.write_text(f'#!/bin/sh\ncd {ROOT}\nexec {sys.executable} -m tests.support.fake_server {dialect} "$@"\n')
    program.chmod(0o755)
    words = [f"generation.backend={dialect}_server", "generation.server.manage=true", f"tracking.uri={shared_store}"]
    words += [f"generation.server.python={program}", "generation.server.device=cpu", "checkpoint.keep_last=9"]
    return resolve("tiny", [*SMALL, *words, "train.iterations=3", "eval.num_ids=2", *overrides])


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    kept = ("reward_mean", "loss_total", "grad_norm", "sampler_ratio_mean", "entropy_mean")
    found = [json.loads(path.read_text()) for path in sorted((run_dir / "metrics").glob("train_iter_*.json"))]
    return [{key: each[key] for key in kept} for each in found]


def test_a_killed_server_is_started_again_and_the_numbers_stay(
    small_model: Path, tmp_path: Path, shared_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = runs.train(managed(tmp_path, shared_store, "vllm"))
    monkeypatch.setenv("FAKE_DIES_AFTER", "14")
    monkeypatch.setenv("FAKE_DIED", str(tmp_path / "died"))
    hurt = runs.train(managed(tmp_path, shared_store, "vllm"))
    assert (tmp_path / "died").exists()
    assert numbers(hurt.run_dir) == numbers(whole.run_dir)
    perf = [json.loads(path.read_text()) for path in sorted((hurt.run_dir / "metrics").glob("train_iter_*.json"))]
    assert sum(each["server_restarts"] for each in perf) == 1
    assert gone(f"--model {small_model}")


def test_a_server_that_sleeps_during_updates_changes_no_number(tmp_path: Path, shared_store: str) -> None:
    whole, napping = (
        runs.train(managed(tmp_path, shared_store, "vllm", f"generation.server.sleep={sleeps}"))
        for sleeps in ("false", "true")
    )
    assert numbers(napping.run_dir) == numbers(whole.run_dir)


def test_a_server_that_was_killed_is_told_as_that(
    tmp_path: Path, shared_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_DIES_AFTER", "14")
    monkeypatch.setenv("FAKE_DIED", str(tmp_path / "died"))
    told = r"the server ended \(by signal 9, SIGKILL\); the end of \S+server\.log:\n(.*\n)*fake server is up"
    with pytest.raises(ServerFailed, match=told):
        runs.train(managed(tmp_path, shared_store, "vllm", "generation.retry_seconds=0"))


def test_weights_can_arrive_by_a_restart(tmp_path: Path, shared_store: str) -> None:
    reloaded = runs.train(managed(tmp_path, shared_store, "sglang"))
    restarted = runs.train(managed(tmp_path, shared_store, "sglang", "generation.sync=restart"))
    assert numbers(restarted.run_dir) == numbers(reloaded.run_dir)


def test_the_log_of_a_server_that_does_not_start_is_kept_with_the_run(
    tmp_path: Path, shared_store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = managed(tmp_path, shared_store, "vllm")
    (tmp_path / "python").write_text("#!/bin/sh\necho out of memory\nexit 3\n")
    with pytest.raises(ServerFailed, match="out of memory"):
        runs.train(config)
    logs = list(Path(shared_store.removeprefix("sqlite:///")).parent.rglob("server.log"))
    assert any("out of memory" in log.read_text() for log in logs)
