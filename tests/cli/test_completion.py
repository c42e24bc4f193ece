"""A tab completes commands, options, settings and their values, in a real bash and zsh, without starting Python."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo_mlflow.cli import commands, completion
from grpo_mlflow.config import presets
from grpo_mlflow.config.describe import settings
from grpo_mlflow.config.keys import KEYS
from grpo_mlflow.errors import ConfigError
from tests.support.shells import Shell

ASK = """
COMP_LINE="$1" COMP_POINT=${#1}
_grpo
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the scripts and two files of a user."""
    folder = tmp_path_factory.mktemp("completion")
    for shell in completion.SHELLS:
        (folder / f"grpo.{shell}").write_text(completion.script(shell, commands.COMMANDS))
    (folder / "mine.yaml").write_text("base: tiny\n")
    (folder / "rows.jsonl").write_text("")
    return folder


def completed(line: str, folder: Path) -> list[str]:
    """Return what bash puts in the place of the last word of a line (after `=`, which begins a word of its own)."""
    words = ["bash", "--norc", "-c", f"source {folder}/grpo.bash\n{ASK}", "ask", line]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("grpo ", list(commands.COMMANDS)),
        ("grpo tr", ["train"]),
        ("grpo train train.l", [f"{key}=" for key in KEYS if key.startswith("train.l")]),
        ("grpo train seed=1 tra", ["train.", "tracking."]),
        ("grpo train train.method=", ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo"]),
        ("grpo train train.method=d", ["dr_grpo", "dapo"]),
        ("grpo train eval.greedy=f", ["false"]),
        ("grpo train train.lr=", []),
        ("grpo train data.rows.path=ro", ["rows.jsonl"]),
        ("grpo train --config ", ["mine.yaml", "rows.jsonl", "grpo.bash", "grpo.zsh", *presets()]),
        ("grpo train --config mi", ["mine.yaml"]),
        ("grpo train --pr", ["--print-config"]),
        ("grpo train --help train.k", [key for key in KEYS if key.startswith("train.k")]),
        ("grpo train --help che", ["checkpoint", "checkpoint.save_interval", "checkpoint.keep_last"]),
        ("grpo optimize --sampler n", ["nsga2"]),
        ("grpo optimize --space f", ["full"]),
        ("grpo evaluate --ch", ["--checkpoint"]),
        ("grpo evaluate --checkpoint ", ["best", "last"]),
        ("grpo server --print-com", ["--print-command"]),
        ("grpo completion ", ["bash", "zsh"]),
    ],
)
def test_bash_completes(line: str, expected: list[str], folder: Path) -> None:
    assert sorted(completed(line, folder)) == sorted(expected)


def test_every_value_with_choices_is_completed(folder: Path) -> None:
    """But null alone, which says nothing of what else the text may be."""
    for key in ("model.attn_implementation", "search.pruner", "generation.backend", "data.task"):
        assert completed(f"grpo train {key}=", folder) == list(settings()[key].choices)


def test_a_key_of_bash_that_takes_the_equals_sign_into_words(folder: Path) -> None:
    script = f"COMP_WORDBREAKS=' '\nsource {folder}/grpo.bash\n{ASK}"
    words = ["bash", "--norc", "-c", script, "ask", "grpo train train.method=gs"]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "train.method=gspo\n"


@pytest.fixture(params=completion.SHELLS)
def shell(request: pytest.FixtureRequest, folder: Path) -> Iterator[Shell]:
    name = request.param
    if (found := shutil.which(name)) is None:
        pytest.skip(f"{name} is not installed")
    start = "autoload -Uz compinit; compinit -u -D; " if name == "zsh" else "bind 'set bell-style none'; "
    with Shell([found, *(["-f"] if name == "zsh" else ["--norc", "--noprofile"]), "-i"], folder, {}) as started:
        started.type(f"PS1='READY> '; {start}source ./grpo.{name}; echo set up $((40 + 2))\n", r"set up 42[^$]*READY> ")
        yield started


def test_a_tab_on_a_terminal(shell: Shell) -> None:
    shell.type("grpo tra\t", r"train ")
    shell.type("train.lr_sch\t", r"train\.lr_schedule=$")
    shell.type("cos\t", r"cosine $")
    shell.type("gen\t", r"generation\.$")
    shell.type("sync=l\t", r"lora $")
    shell.type("--config qui\t", r"quick $")


def test_it_is_quick(folder: Path) -> None:
    """To print the script no library is imported that takes seconds, and a tab starts no Python."""
    code = (
        "import sys; from grpo_mlflow.cli.commands import main; main(['completion', 'bash']); "
        "sys.exit(str({'torch', 'mlflow', 'optuna', 'transformers'} & {*sys.modules} or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
    assert done.stdout == (folder / "grpo.bash").read_text()
    script = (folder / "grpo.bash").read_text()
    assert "python" not in script.replace("generation.server.python", "")
    begun = time.perf_counter()
    completed("grpo train train.l", folder)
    assert time.perf_counter() - begun < 0.3


@pytest.mark.parametrize("words", [[], ["fish"], ["bash", "zsh"]])
def test_another_shell_is_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="no such shell; allowed: bash, zsh"):
        commands.main(["completion", *words])
