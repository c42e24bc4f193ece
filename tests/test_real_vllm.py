"""Against a real vLLM, the CPU build in .venv-vllm: `make test-server`.

One server with tied embeddings serves most tests; a second, untied one shows that both kinds take new weights.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from transformers import Qwen2ForCausalLM

from grpo_mlflow import runs, tiny
from grpo_mlflow.config import Config, Resolved, ServerConfig, TinyConfig, resolve
from grpo_mlflow.doctor import Doctor
from grpo_mlflow.generation import Generator, Generators, Sampling
from grpo_mlflow.generation.remote import ServerGenerator
from grpo_mlflow.policy import Policy
from grpo_mlflow.statistics import paired_difference
from tests.conformance import ShapedConformance, ids_of, prompts

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-vllm: make .venv-vllm/.installed"),
]
LEARNER = (
    "train.iterations=10",
    "train.lr_warmup_steps=2",
    "eval.interval=10",
    "checkpoint.save_interval=2",
    f"generation.server.python={PYTHON}",
)


def build(tied: bool) -> Policy:
    """A model with random weights that vLLM's CPU attention takes (heads of 32)."""
    policy = tiny.build(TinyConfig(hidden_size=64, layers=2, heads=2, seed=3))
    if tied:
        return policy
    settings = policy.model.config.to_dict() | {"tie_word_embeddings": False}
    model = Qwen2ForCausalLM(type(policy.model.config)(**settings)).eval()
    model.load_state_dict(policy.model.state_dict())
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head.copy_(0.05 * torch.randn(head.shape, generator=torch.Generator().manual_seed(1)))
    return Policy(model, policy.tokenizer, policy.device, policy.dtype, policy.eos_ids, policy.pad_id)


def serving(policy: Policy, folder: Path) -> Generators:
    policy.save(folder / "model")
    base = resolve("tiny", ["generation.backend=vllm_server", "generation.server.manage=true"]).config
    server = ServerConfig(manage=True, python=str(PYTHON), arguments=("--max-model-len", "512"))
    settings = base.generation.model_copy(update={"server": server, "batch_size": 2})
    config: Config = base.model_copy(update={"generation": settings})
    return Generators(config, policy, folder / "model", folder / "server.log", print)


def move(policy: Policy, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def policy() -> Policy:
    return build(tied=True)


@pytest.fixture(scope="module")
def generator(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Generator]:
    with serving(policy, tmp_path_factory.mktemp("tied")) as generators:
        found = generators.training()
        found.sync(0)
        yield found


def _three_syncs(policy: Policy, generator: Generator) -> None:
    seen = []
    for version in (1, 2, 3):
        move(policy, version)
        generator.sync(version)
        assert generator.metrics()["server_canary_error"] < 1e-3
        groups = generator.generate(prompts(policy), 2, Sampling(8), 0, ("x",))
        assert {c.policy_version for group in groups for c in group} == {version}
        seen.append(ids_of(groups))
    assert seen[0] != seen[1] != seen[2]


class TestConformance(ShapedConformance):
    """The suite that every backend passes; runs first, while the server has version 0."""


def test_a_tied_model_takes_new_weights(policy: Policy, generator: Generator) -> None:
    _three_syncs(policy, generator)


def test_the_doctor_and_the_gpu_tests_pass_on_it(generator: Generator, tmp_path: Path) -> None:
    assert isinstance(generator, ServerGenerator)
    url, folder = generator.server.url, generator.server.folder
    assert folder is not None
    words = [f"model.train_id={folder}", "generation.backend=vllm_server", f"generation.base_url={url}"]
    config = resolve("tiny", [*words, f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]).config
    began = time.monotonic()
    checks = list(Doctor(config, tmp_path).examine())
    print(f"doctor: {time.monotonic() - began:.1f} s")
    assert [str(check) for check in checks if check.state != "ok"] == []
    there = {"GRPO_TEST_SERVER": url, "GRPO_TEST_MODEL": str(folder), "GRPO_TEST_DEVICE": "cpu"}
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/test_gpu.py"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **there}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout


def test_an_untied_model_takes_new_weights(tmp_path: Path) -> None:
    policy = build(tied=False)
    with serving(policy, tmp_path) as generators:
        found = generators.training()
        found.sync(0)
        _three_syncs(policy, found)


@pytest.fixture(scope="module")
def local(shared_store: str) -> runs.Finished:
    return runs.train(resolve("tiny", [*LEARNER, f"tracking.uri={shared_store}"]))


def served(shared_store: str, *overrides: str) -> Resolved:
    words = ["generation.backend=vllm_server", "generation.server.manage=true", f"tracking.uri={shared_store}"]
    return resolve("tiny", [*LEARNER, *words, *overrides])


def test_training_learns_as_in_process_though_the_server_is_killed(
    local: runs.Finished, shared_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two things in one run, since a start takes long: the same learning, and a killed server that is replaced."""
    killed: list[int] = []

    def kill() -> None:
        while not killed:
            time.sleep(0.1)
            for metrics in Path(shared_store.removeprefix("sqlite:///")).parent.rglob("train_iter_003.json"):
                if metrics.parent.parent != local.run_dir:
                    children = psutil.Process().children(recursive=True)
                    for process in children:
                        if "api_server" in " ".join(process.cmdline()) and "warden.py" not in process.cmdline()[1]:
                            process.kill()
                            killed.append(process.pid)

    threading.Thread(target=kill, daemon=True).start()
    finished = runs.train(served(shared_store))
    assert killed
    perf = [json.loads(path.read_text()) for path in sorted((finished.run_dir / "metrics").glob("train_iter_*.json"))]
    assert len(perf) == 10
    assert sum(each["server_restarts"] for each in perf) >= 1
    difference = paired_difference(finished.progress.last_rates, local.progress.last_rates)
    print(f"after 10 iterations, server minus in-process: {difference.value:+.3f} +- {difference.half_width:.3f}")
    assert abs(difference.value) <= difference.half_width
    gain = paired_difference(finished.progress.last_rates, finished.progress.first_rates)
    assert gain.value > gain.half_width  # it did learn


def test_no_process_outlives_a_killed_trainer(tmp_path: Path, local: runs.Finished) -> None:
    log = tmp_path / "out"
    command = [sys.executable, "-m", "entrypoints.train", *LEARNER, f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
    command += ["generation.backend=vllm_server", "generation.server.manage=true", "train.iterations=1000"]
    with log.open("w") as stream:
        trainer = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=stream)
    deadline = time.monotonic() + 300
    while "iter    1" not in log.read_text() and time.monotonic() < deadline:
        assert trainer.poll() is None, log.read_text()
        time.sleep(0.5)
    family = psutil.Process(trainer.pid).children(recursive=True)
    assert len(family) >= 3  # warden, server, engine
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    left, deadline = family, time.monotonic() + 30
    while left and time.monotonic() < deadline:
        time.sleep(0.2)
        left = [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert left == []
