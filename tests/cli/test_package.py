"""The package as others install it: a wheel, without this folder, beside other packages, on other systems."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.support.paths import ROOT

# Windows has no such modules, and no such signal; the libraries come first, as they know themselves where they are.
ELSEWHERE = """
import signal, sys
import accelerate, mlflow, optuna, psutil, torch, transformers.masking_utils
sys.modules["fcntl"] = sys.modules["resource"] = None
del signal.SIGHUP
import importlib, pkgutil, grpo_mlflow
for module in pkgutil.walk_packages(grpo_mlflow.__path__, "grpo_mlflow."):
    if ".serverside." not in module.name and not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from grpo_mlflow.cli.commands import main
main(["smoke"])
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("grpo_mlflow", "entrypoints"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "made", "."]
    subprocess.run(command, cwd=folder, check=True, timeout=300)
    return next((folder / "made").glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, the libraries of this one, and a package of the name `entrypoints`."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    packages = folder / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    # A folder that a .pth names has no say in what is installed where: the checkout stays unknown.
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (packages / "entrypoints.py").write_text('"""PyPI has a package of this name."""\nWHOSE = "theirs"\n')
    python = str(folder / "bin" / "python")
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(command, check=True, timeout=300)
    return folder


def call(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(words, cwd=folder, env=own, capture_output=True, text=True, check=False, timeout=300)


def test_the_wheel_holds_one_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"grpo_mlflow"}
    packed = {name for name in names if name.startswith("grpo_mlflow/")}
    tracked = subprocess.run(
        ["git", "ls-files", "grpo_mlflow"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert packed == {*tracked}


@pytest.mark.slow
def test_the_wheel_works_without_the_checkout(installed: Path, tmp_path: Path) -> None:
    python, grpo = str(installed / "bin" / "python"), str(installed / "bin" / "grpo")
    where = call(
        tmp_path, python, "-c", "import grpo_mlflow, entrypoints; print(grpo_mlflow.__file__, entrypoints.WHOSE)"
    )
    assert where.stdout.split() == [str(next(installed.rglob("grpo_mlflow/__init__.py"))), "theirs"], where.stderr
    for words in ([grpo, "smoke"], [python, "-m", "grpo_mlflow", "smoke"]):
        done = call(tmp_path, *words)
        assert done.returncode == 0, done.stderr
        assert "Eval metrics: " in done.stdout
    wrong = call(tmp_path, grpo, "trian")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "allowed: train" in wrong.stderr


@pytest.mark.slow
def test_what_linux_alone_has_is_left_out_elsewhere(tmp_path: Path) -> None:
    done = call(tmp_path, sys.executable, "-c", ELSEWHERE)
    assert done.returncode == 0, done.stderr
    assert "Eval metrics: " in done.stdout
