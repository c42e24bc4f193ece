"""What commands are called here, and where they were typed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_mlflow.program import program, typed_in

ASK = "from grpo_mlflow.program import typed_in; print(typed_in())"
# As `mlflow run` does: a shell in the folder of the project.
LAUNCH = """
import os, subprocess, sys
own = {**os.environ, "MLFLOW_RUN_ID": "0" * 32}
subprocess.run(["bash", "-c", sys.argv[2]], cwd=sys.argv[1], env=own, check=True)
"""


@pytest.mark.parametrize("command", ['{python} -c "{ask}"', 'true && {python} -c "{ask}"; true'])
def test_under_mlflow_run_it_is_the_folder_of_mlflow(command: str, tmp_path: Path) -> None:
    """Whether the shell becomes the process or waits for it."""
    project, here = tmp_path / "project", tmp_path / "here"
    project.mkdir()
    here.mkdir()
    words = [sys.executable, "-c", LAUNCH, str(project), command.format(python=sys.executable, ask=ASK)]
    own = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(words, cwd=here, env=own, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(here)


def test_else_it_is_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert typed_in() == tmp_path


def test_a_program_that_the_shell_finds_elsewhere_is_named_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(sys.executable).parent
    monkeypatch.setenv("PATH", str(folder))
    assert program("mlflow", "mlflow") == "mlflow"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert program("mlflow", "mlflow") == str(folder / "mlflow")
    assert program("none", "some.module") == f"{sys.executable} -m some.module"
