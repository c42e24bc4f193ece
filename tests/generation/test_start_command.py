"""The command that starts a server by hand: complete for a config, and it works when it is pasted into a shell."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_mlflow.cli import server as command_line
from grpo_mlflow.config import Config, addresses, resolve
from grpo_mlflow.config.engines import SERVERS
from grpo_mlflow.generation.server.launch import Launch, launch_as, start_command
from tests.support.paths import ROOT


def configured(backend: str, *words: str) -> Config:
    given = [f"generation.backend={backend}", "generation.base_url=http://127.0.0.1:30000", *words]
    return resolve("tiny", given).config


def command_for(backend: str, *words: str, model: str | Path = "org/model") -> str:
    config = configured(backend, *words)
    (address,) = addresses.of(config.generation.base_url) or (None,)
    return start_command(config, backend, address, model)


@pytest.mark.parametrize("backend", SERVERS)
def test_it_works_pasted(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a space and a quote in its name, and an interpreter that tells what it is given."""
    folder = tmp_path / "it's a model"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    program = folder / "python"
    program.write_text(f'#!{sys.executable}\nimport os, sys\nprint(dict(os.environ), sys.argv[1:], sep="\\n")\n')
    program.chmod(0o755)
    words = [f"generation.server.python={program}", "generation.server.device=cpu"]
    text = command_for(backend, *words, model=folder)
    assert "\n" not in text
    done = subprocess.run(["sh", "-c", text], cwd=tmp_path, capture_output=True, text=True, check=True)
    environment, arguments = (eval(line) for line in done.stdout.splitlines())
    expected = launch_as(configured(backend, *words), backend, folder, 30000)
    assert tuple(arguments) == expected.command[1:]
    assert {name: environment[name] for name in expected.environment} == expected.environment
    assert str(folder) in arguments


def test_the_extension_is_found_from_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (ROOT, tmp_path):
        monkeypatch.chdir(folder)
        words = shlex.split(command_for("vllm_server"))
        value = next(word for word in words if word.startswith("PYTHONPATH=")).removeprefix("PYTHONPATH=")
        assert (folder / value / "grpo_vllm_worker.py").is_file()
        assert Path(value).is_absolute() == (folder == tmp_path)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("generation.base_url=http://gpu-box:8123/v1", "--host 0.0.0.0 --port 8123"),
        ("generation.base_url=http://me:hunter2@gpu-box:8123", "--host 0.0.0.0 --port 8123"),
        ("generation.base_url=http://gpu-box", "--host 0.0.0.0 --port 80"),
        ("generation.base_url=https://gpu-box", "--host 0.0.0.0 --port 443"),
        ("generation.base_url=http://10.0.0.7:8123", "--host 0.0.0.0 --port 8123"),
        ("generation.base_url=http://[fd00::7]:8123", "--host :: --port 8123"),
        ("generation.base_url=http://[::1]:8123", "--host ::1 --port 8123"),
        ("generation.base_url=http://127.0.0.2:8123", "--host 127.0.0.2 --port 8123"),
        ("generation.base_url=http://localhost:8123", "--host 127.0.0.1 --port 8123"),
        ("model.dtype=bfloat16", "--dtype bfloat16"),
        ("model.trust_remote_code=true", "--trust-remote-code"),
        ("generation.server.arguments=[--max-model-len, '512']", "--max-model-len 512"),
    ],
)
@pytest.mark.parametrize("backend", SERVERS)
def test_it_holds_what_the_config_needs(backend: str, word: str, expected: str) -> None:
    assert f" {expected} " in f"{command_for(backend, word)} "


@pytest.mark.parametrize(
    ("words", "port"),
    [
        (["generation.base_url=http://gpu-box:8123"], 8123),
        (["generation.base_url=http://gpu-box"], 7000),
        (["generation.base_url=null", "generation.server.manage=true"], 7000),
    ],
)
def test_the_port_is_that_of_the_address_where_it_has_one(words: list[str], port: int) -> None:
    assert f" --port {port} " in command_for("vllm_server", "generation.server.port=7000", *words)


def test_vllm_takes_the_longest_context_that_its_memory_holds() -> None:
    """Without this, it refuses to start with a model whose whole context does not fit into its cache."""
    assert " --max-model-len auto " in command_for("vllm_server")


@pytest.mark.parametrize(("backend", "other"), [tuple(SERVERS), tuple(SERVERS)[::-1]])
def test_the_second_kind_of_server_is_started_by_its_own_interpreter(backend: str, other: str) -> None:
    """`generation.server` is about the kind that samples rollouts; evaluations may come from another kind."""
    words = ["python=mine", "memory=0.3", "port=7000", "arguments=[--mine]", "device=cuda:1"]
    config = configured(
        *(
            backend,
            f"eval.backend={other}",
            "eval.base_url=http://127.0.0.1",
            "generation.behaviour_logprobs=recompute",
        ),
        *(f"generation.server.{word}" for word in words),
    )
    plain = configured(other, "generation.server.device=cuda:1")
    command = start_command(config, other, str(config.eval.base_url), "org/model")
    assert command == start_command(plain, other, "http://127.0.0.1", "org/model")
    assert f" {SERVERS[other].python} -m" in f" {command}"
    assert "--port 80 " in command
    assert "mine -m" in start_command(config, backend, str(config.generation.base_url), "org/model")
    measured = resolve(
        "tiny",
        [f"eval.backend={other}", "eval.base_url=http://127.0.0.1:7", "generation.server.python=mine"],
    ).config
    assert "mine -m" in start_command(measured, other, str(measured.eval.base_url), "org/model")


@pytest.mark.parametrize("backend", SERVERS)
def test_each_kind_has_its_own_interpreter_and_address(backend: str) -> None:
    config = configured(backend)
    assert f"{SERVERS[backend].python} -m" in command_for(backend)
    assert "--host 127.0.0.1 --port 30000" in start_command(config, backend, None, "org/model")
    assert " mine -m" in f" {command_for(backend, 'generation.server.python=mine')}"


def test_what_only_some_configs_need_is_there_for_those_only() -> None:
    lora = ["model.lora.rank=4", "generation.sync=lora"]
    adapters, plain = command_for("vllm_server", *lora), command_for("vllm_server")
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in adapters
    assert "--enable-lora --max-lora-rank 8" in adapters
    assert "LORA" not in plain.upper()
    cpu, gpu = (command_for("vllm_server", f"generation.server.device={device}") for device in ("cpu", "cuda"))
    assert "--enforce-eager --max-num-batched-tokens 32768" in cpu
    assert "VLLM_CPU_KVCACHE_SPACE=1 " in cpu
    fraction = command_for("vllm_server", "generation.server.device=cpu", "generation.server.memory=1.5")
    assert "VLLM_CPU_KVCACHE_SPACE=2 " in fraction  # vLLM takes whole numbers only
    assert "--enforce-eager" not in gpu
    assert "--enforce-eager" not in command_for("vllm_server", "model.device=cuda:2")  # so there are GPUs
    assert "trust" not in plain


def test_messages_show_it_without_secrets() -> None:
    words = ["--api-key", "sk-1", "--hf-token=hf-2", "--max-num-seqs", "4"]
    config = configured("vllm_server", f"generation.server.arguments={json.dumps(words)}")
    shown, whole = (start_command(config, "vllm_server", None, "m", secrets=secrets) for secrets in (False, True))
    assert shown.endswith("--api-key '***' '--hf-token=***' --max-num-seqs 4")
    assert whole.endswith("--api-key sk-1 --hf-token=hf-2 --max-num-seqs 4")


def test_a_reference_is_a_variable_of_the_shell(
    capsys: pytest.CaptureFixture[str], small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANTED_NAME", "a s3cret 'of' mine")
    words = json.dumps(["--api-key", "${ENV:PLANTED_NAME}", "--hf-token=${ENV:PLANTED_NAME}"])
    command_line.main(["--print-command", f"model.train_id={small_model}", f"generation.server.arguments={words}"])
    printed = capsys.readouterr().out
    assert "s3cret" not in printed
    given = printed.split("--api-key")[1].strip()
    done = subprocess.run(["sh", "-c", f"printf '%s|' {given}"], capture_output=True, text=True, check=True)
    assert done.stdout == "a s3cret 'of' mine|--hf-token=a s3cret 'of' mine|"


def test_secrets_are_moved_from_the_command_line_to_the_environment() -> None:
    options = {"--api-key": "VLLM_API_KEY", "--hf-token": "HF_TOKEN"}

    def private(*words: str) -> tuple[list[str], dict[str, str]]:
        return Launch(("python", *words), {"A": "b"}, "", options).private()

    assert private("--api-key", "k", "--port", "1", "--hf-token=t") == (
        ["python", "--port", "1"],
        {"A": "b", "VLLM_API_KEY": "k", "HF_TOKEN": "t"},
    )
    assert private("--port", "1", "--api-key", "k") == (["python", "--port", "1"], {"A": "b", "VLLM_API_KEY": "k"})
    assert private("--api-key", "old", "--api-key", "new")[1]["VLLM_API_KEY"] == "new"
    assert private("--api-key", "one", "two", "--port") == (["python", "--api-key", "one", "two", "--port"], {"A": "b"})
    assert private("--api-key") == (["python", "--api-key"], {"A": "b"})


def test_it_is_printed_and_nothing_is_started(capsys: pytest.CaptureFixture[str], small_model: Path) -> None:
    words = [f"model.train_id={small_model}", "generation.base_url=http://127.0.0.1:30123"]
    command_line.main(["--print-command", "generation.server.device=cpu", *words])
    printed = capsys.readouterr()
    assert printed.out.rstrip("\n").endswith("--enforce-eager --max-num-batched-tokens 32768")
    assert len(printed.out.splitlines()) == 1
    assert f"--model {small_model} " in printed.out
    assert "--port 30123 " in printed.out
    assert printed.err == ""


@pytest.mark.parametrize(
    ("words", "address"),
    [
        ([], "--host 127.0.0.1 --port 30000"),  # the preset's
        (["generation.server.port=31000"], "--host 127.0.0.1 --port 31000"),
        (
            ["generation.base_url=http://localhost:30123", "generation.server.port=31000"],
            "--host 127.0.0.1 --port 30123",
        ),
        (["generation.base_url=http://gpu-box:30123"], "--host 0.0.0.0 --port 30123"),
    ],
)
def test_what_the_user_chose_wins_over_the_address_of_a_preset(
    capsys: pytest.CaptureFixture[str], words: list[str], address: str
) -> None:
    command_line.main(["--print-command", "--config", "qwen", *words])
    printed = capsys.readouterr()
    assert f" {address} " in printed.out
    assert len(printed.out.splitlines()) == 1
    assert len(printed.err.splitlines()) == ("0.0.0.0" in address)  # who can reach it


def test_a_file_that_names_another_kind_of_server_is_heard(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(
        "base: qwen\ngeneration: {backend: sglang_server, base_url: 'http://h:7', behaviour_logprobs: recompute}\n"
    )
    command_line.main(["--print-command", "--config", str(path)])
    assert "-m sglang.launch_server --model-path Qwen/Qwen2.5-1.5B --host 0.0.0.0 --port 7" in capsys.readouterr().out
