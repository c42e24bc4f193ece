"""What is made in the project's folder is never committed by accident."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import ROOT


@pytest.mark.parametrize("name", [".venv", ".venv-vllm", ".models", "mlruns", "outputs"])
@pytest.mark.parametrize("linked", [False, True])
def test_what_is_made_here_is_ignored_as_a_folder_and_as_a_link(tmp_path: Path, name: str, linked: bool) -> None:
    """Environments, models and runs are large, so they often lie elsewhere, with a link in their place."""
    folder = tmp_path / "project"
    subprocess.run(["git", "init", "--quiet", folder], check=True)
    shutil.copy(ROOT / ".gitignore", folder)
    made = tmp_path / "elsewhere" if linked else folder / name
    made.mkdir()
    (made / "file").touch()
    if linked:
        (folder / name).symlink_to(made)
    status = ["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=all"]
    assert subprocess.run(status, capture_output=True, text=True, check=True).stdout == "?? .gitignore\n"
