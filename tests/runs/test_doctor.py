"""The doctor names what is wrong, and what to do, for every planted fault; and passes what works."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import mlflow
import pytest
import torch

from grpo_mlflow.cli import doctor as command
from grpo_mlflow.config import resolve
from grpo_mlflow.errors import ServerUnfit, UserError, one_line
from grpo_mlflow.generation import Generator
from grpo_mlflow.generation.server.engine import Remedies
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.runs import samples
from grpo_mlflow.runs.doctor import Check, Doctor, enough
from grpo_mlflow.runs.server_checks import Caution, ServerCheckup, Trouble
from grpo_mlflow.tasks import Task
from grpo_mlflow.types import Completion, Problem, Prompt, Split, Verdict
from tests.support.fake_server import DIALECTS, FakeServer, Quirks
from tests.support.paths import ROOT
from tests.support.small_runs import SMALL


def examine(shared_store: str, folder: Path, *overrides: str) -> list[Check]:
    resolved = resolve("tiny", [*SMALL, f"tracking.uri={shared_store}", *overrides])
    return list(Doctor(resolved.config, folder).examine())


def failed(checks: Sequence[Check]) -> Check:
    """The first failure; what builds on it is skipped."""
    first = next(check for check in checks if check.state == "FAILED")
    assert all(check.state == "ok" for check in checks[: checks.index(first)])
    assert first.remedy
    return first


def words_of(server: FakeServer) -> list[str]:
    return [f"generation.backend={server.dialect}_server", f"generation.base_url={server.url}"]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_all_is_well_with_a_server_that_works(
    small_model: Path, shared_store: str, tmp_path: Path, dialect: str
) -> None:
    with FakeServer(dialect, small_model) as server:
        checks = examine(shared_store, tmp_path, *words_of(server))
    assert [str(check) for check in checks if check.state != "ok"] == []
    assert {check.name for check in checks} >= {
        "server",
        "tokenizer",
        "log-probabilities",
        "new weights",
        "MLflow store",
    }


@pytest.mark.parametrize("sync", ["lora", "reload"])
def test_an_adapter_is_sent_and_proven_too(small_model: Path, shared_store: str, tmp_path: Path, sync: str) -> None:
    with FakeServer("vllm", small_model) as server:
        words = [*words_of(server), "model.lora.rank=4", f"generation.sync={sync}"]
        checks = examine(shared_store, tmp_path, *words)
        assert (len(server.adapters), bool(server.loads)) == ((1, False) if sync == "lora" else (0, True))
    assert [str(check) for check in checks if check.state != "ok"] == []
    assert "new weights" in {check.name for check in checks}


def test_all_is_well_without_a_server(shared_store: str, tmp_path: Path) -> None:
    checks = examine(shared_store, tmp_path)
    assert {check.state for check in checks} == {"ok"}
    assert "server" not in {check.name for check in checks}


QUIRKS = {
    "no token ids": (Quirks(without_token_ids=True), "vllm", "server", ["without token ids"], "docs/servers.md"),
    "no log-probabilities": (
        Quirks(without_logprobs=True),
        "sglang",
        "server",
        ["no log-probabilities"],
        "docs/servers.md says which versions and options it needs; Start it again with this command, or choose "
        "generation.behaviour_logprobs=recompute: ",
    ),
    "another tokenizer": (Quirks(other_tokenizer=True), "vllm", "tokenizer", ["differs"], "model.train_id"),
    "no development endpoints": (
        Quirks(without_development=True),
        "vllm",
        "weights",
        ["VLLM_SERVER_DEV_MODE=1"],
        "VLLM_SERVER_DEV_MODE=1",
    ),
    "keeps its old weights": (
        Quirks(keeps_old_weights=True),
        "vllm",
        "new weights",
        ["given new weights", "differ from the trainer's"],
        "docs/servers.md",
    ),
    "raw log-probabilities": (
        Quirks(raw_logprobs=True),
        "vllm",
        "log-probabilities",
        ["differ from the trainer's"],
        "--logprobs-mode processed_logprobs",
    ),
    "a small context": (Quirks(context=170), "vllm", "completions", ["context"], "line says"),
}


@pytest.mark.parametrize("name", QUIRKS)
def test_a_server_that_is_wrong_is_found(small_model: Path, shared_store: str, tmp_path: Path, name: str) -> None:
    quirks, dialect, check, found, remedy = QUIRKS[name]
    with FakeServer(dialect, small_model, quirks=quirks) as server:
        words = [*words_of(server), "generation.temperature=0.5", "generation.max_new_tokens=200"]
        first = failed(examine(shared_store, tmp_path, *words))
    assert first.name == check
    assert all(word in first.found for word in found), first.found
    assert remedy in first.remedy


def test_a_server_that_does_not_tokenize_passes(small_model: Path, shared_store: str, tmp_path: Path) -> None:
    with FakeServer("vllm", small_model, quirks=Quirks(refuses={"/tokenize": 404})) as server:
        checks = examine(shared_store, tmp_path, *words_of(server))
    assert {check.state for check in checks} == {"ok"}
    assert "not checked" in next(check.found for check in checks if check.name == "tokenizer")


def test_another_model_on_a_static_server_is_found(small_model: Path, shared_store: str, tmp_path: Path) -> None:
    with FakeServer("vllm", small_model) as server:
        with torch.no_grad():
            server.model.get_input_embeddings().weight.mul_(1.2)
        words = [*words_of(server), "generation.sync=none", "eval.backend=local"]
        first = failed(examine(shared_store, tmp_path, *words))
    assert first.name == "weights"
    assert "model.train_id" in first.found


class Unlucky:
    """A generator over a server that loses its weights between the checks."""

    def __init__(self, error: UserError) -> None:
        self.error, self.server = error, self
        self.url, self.remedies = "http://127.0.0.1:9", Remedies(install="", context="")

    def connect(self) -> str:
        raise self.error

    def generate(self, *_: object) -> None:
        raise self.error


def test_the_command_of_a_remedy_is_never_cut(policy: Policy) -> None:
    command = f"python -m vllm --model {'m' * 400} --port 1"
    error = ServerUnfit("x" * 400, f"Start it again with this command: {command}")
    unlucky: Any = Unlucky(error)
    checkup = ServerCheckup(resolve("tiny").config, policy, unlucky, Prompt("p", (), (1, 2)))
    for check in (checkup.connect, checkup.completions):
        with pytest.raises(Trouble) as caught:
            check()
        assert caught.value.remedy.endswith(command)
        assert str(caught.value) == "x" * 300
    assert one_line(error) == f"{'x' * 300}. {error.remedy}"
    assert one_line(UserError("x" * 400)) == "x" * 300


def test_a_server_of_its_own_for_evaluation_is_examined_too(
    small_model: Path, shared_store: str, tmp_path: Path
) -> None:
    with FakeServer("vllm", small_model) as one, FakeServer("sglang", small_model) as other:
        words = [*words_of(one), "eval.backend=sglang_server", f"eval.base_url={other.url}"]
        checks = examine(shared_store, tmp_path, *words)
        assert {check.state for check in checks} == {"ok"}
        assert {"new weights", "evaluation new weights"} <= {check.name for check in checks}
        other.quirks = Quirks(other_tokenizer=True)
        assert failed(examine(shared_store, tmp_path, *words)).name == "evaluation tokenizer"


def test_a_server_that_does_not_start_is_found(shared_store: str, tmp_path: Path) -> None:
    words = ["generation.backend=vllm_server", "generation.server.manage=true", "generation.server.python=/bin/false"]
    first = failed(examine(shared_store, tmp_path, *words))
    assert (first.name, "ended while it started" in first.found) == ("server start", True)


def test_no_server_is_found(shared_store: str, tmp_path: Path) -> None:
    first = failed(
        examine(shared_store, tmp_path, "generation.backend=vllm_server", "generation.base_url=http://127.0.0.1:9")
    )
    assert (first.name, "127.0.0.1:9" in first.found, "make server" in first.remedy) == ("server", True, True)
    assert "connecting failed: /v1/models: cannot connect: ConnectionRefusedError" in first.found


def test_a_store_that_cannot_be_written_is_found(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    first = failed(examine(f"sqlite:///{tmp_path}/file/mlflow.db", tmp_path))
    assert (first.name, "tracking.uri" in first.remedy) == ("MLflow store", True)


def test_a_device_that_is_not_there_is_found(shared_store: str, tmp_path: Path) -> None:
    first = failed(examine(shared_store, tmp_path, "model.device=cuda:99"))
    assert (first.name, "model.device=auto" in first.remedy) == ("device", True)


def test_a_broken_model_folder_is_found(shared_store: str, tmp_path: Path, small_model: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text((small_model / "config.json").read_text())
    first = failed(examine(shared_store, tmp_path, f"model.train_id={tmp_path}/broken"))
    assert (first.name, "safetensors" in first.remedy) == ("model", True)


def test_completions_longer_than_the_model_reaches_are_found(shared_store: str, tmp_path: Path) -> None:
    first = failed(examine(shared_store, tmp_path, "generation.max_new_tokens=1024"))
    assert (first.name, "generation.max_new_tokens" in first.remedy) == ("model", True)


def test_what_does_not_fit_is_told_with_its_size() -> None:
    assert "1.00 GiB needed" in enough("memory", 2**30, 2**31, "here", "less")
    with pytest.raises(Trouble, match=r"2\.00 GiB needed at least, 1\.0 GiB free on here") as caught:
        enough("memory", 2**31, 2**30, "here", "less")
    assert caught.value.remedy == "less (memory)"


def test_a_wrong_setting_is_a_failed_check_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exception, match=r"train\.lr"):
        command.main(["train.lr=-1"])
    assert "FAILED  configuration" in capsys.readouterr().out


def test_the_command_says_so_in_its_exit_code(small_model: Path, store: str) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        arguments = [sys.executable, "-m", "grpo_mlflow", "doctor", *SMALL, f"tracking.uri={store}"]
        return subprocess.run(
            [*arguments, *words], cwd=ROOT, capture_output=True, text=True, env=dict(os.environ), check=False
        )

    with FakeServer("vllm", small_model) as server:
        good = run(*words_of(server))
    assert (good.returncode, "all is well" in good.stdout) == (0, True), good.stdout + good.stderr
    bad = run("generation.backend=vllm_server", "generation.base_url=http://127.0.0.1:9")
    assert (bad.returncode, "remedy:" in bad.stdout) == (1, True)
    assert "Traceback" not in bad.stderr


def test_only_who_asks_for_it_gets_a_run(store: str, tmp_path: Path) -> None:
    """The run that tries the store is deleted with its files; that of `mlflow run` is not ours to delete."""

    def left(keeps: bool, adopted: str = "") -> list[str]:
        config = resolve("tiny", [*SMALL, f"tracking.uri={store}"]).config
        with pytest.MonkeyPatch.context() as patch:
            if adopted:
                patch.setenv("MLFLOW_RUN_ID", adopted)
            checks = {each.name: each for each in Doctor(config, tmp_path, keeps).examine()}
        assert (checks["MLflow store"].state, "(run " in checks["MLflow store"].found) == ("ok", keeps or bool(adopted))
        client = mlflow.MlflowClient(store)
        return [run.info.run_id for run in client.search_runs([client.get_experiment_by_name("grpo").experiment_id])]

    assert left(keeps=False) == []
    assert not list(tmp_path.glob("mlruns/grpo/*/artifacts/doctor.txt"))
    (kept,) = left(keeps=True)
    adopted = mlflow.MlflowClient(store).create_run("1").info.run_id
    assert {*left(keeps=False, adopted=adopted)} == {kept, adopted}


class Unreachable(Task):
    """The answer that it gives itself is worth nothing."""

    name = "unreachable"

    def problem(self, split: Split, seed: int) -> Problem:
        return Problem(f"unreachable/{split}/{seed}", seed, ({"role": "user", "content": f"{seed}?"},), {"n": seed})

    def verify(self, problem: Problem, text: str) -> Verdict:
        return Verdict(0.25, {"own": 0.25}, False, text or None)

    def reference_answer(self, problem: Problem) -> str:
        return "right"


class Scripted:
    """A generator that writes the same for every prompt."""

    def generate(self, prompts: Sequence[Prompt], k: int, *sampling: object) -> list[list[Completion]]:
        return [[Completion((1, 2), "wrong\n", (0.0, 0.0), "length", 0)] * k for _ in prompts]


def rows_of(folder: Path) -> list[str]:
    rows = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["data.task=rows", f"data.rows.path={folder / 'rows.jsonl'}", "data.num_train_seeds=8"]


def test_three_problems_are_shown_with_their_rewards(shared_store: str, tmp_path: Path) -> None:
    words = [*rows_of(tmp_path), "data.rows.prompt={question} Only the number."]
    found = {check.name: check for check in examine(shared_store, tmp_path, *words)}
    assert found["problems"].state == "ok"
    lines = [" ".join(line.split()) for line in str(found["problems"]).splitlines()]
    assert lines[0].startswith("ok problems rows: 20 distinct, 1")
    assert sum(re.fullmatch(r"user 'What is \d+ \+ 1\? Only the number\.'", line) is not None for line in lines) == 3
    assert sum(re.fullmatch(r"completion .* \(\d+ tokens(, cut off)?\)", line) is not None for line in lines) == 3
    assert sum(re.fullmatch(r"rewards [01] \(exact [01]\), .*success", line) is not None for line in lines) == 3
    assert sum(re.fullmatch(r"its answer '\d+': 1 \(exact 1\), success", line) is not None for line in lines) == 3


def test_a_right_answer_that_is_no_success_is_a_warning(
    policy: Policy,
) -> None:
    with pytest.raises(Caution) as caught:
        samples.show(resolve("tiny", SMALL).config, Unreachable(), policy, cast(Generator, Scripted()))
    assert "right answer of 3 of them is no success" in caught.value.remedy
    assert "completion 'wrong\\n' (2 tokens, cut off)" in str(caught.value)
    assert "its answer 'right': 0.25 (own 0.25), no success" in str(caught.value)
