"""Checkpoints that are whole or absent.

A checkpoint is a Hugging Face model folder with a `trainer/` folder inside (optimizer state, counters, config). It is
written beside its place and renamed; `manifest.json`, with the size and sha256 of every file, is written last, so a
folder without a matching manifest is debris of a crash and is never loaded. The rename alone would not do: folders are
also uploaded, downloaded and copied, and what an interrupted copy leaves has the right name but not all of its files.

    checkpoints/iter_012/{config.json, model.safetensors, tokenizer.json, ..., trainer/, manifest.json}

`iter_012` is the model after 12 iterations. Kept: the newest `keep_last`, the best by pass@1, and
what is registered.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from grpo_mlflow.errors import ModelError, one_line
from grpo_mlflow.runtime.files import write_whole

_NAME = re.compile(r"iter_(\d{3,})")
_WEIGHTS = ".safetensors"
_HELD = "registered"  # the file that says what a checkpoint is kept for
# what reading a file raises that holds something else than what was written to it
WRONG = (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError, SafetensorError)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint on disk; `score` is its pass@1 where it was evaluated."""

    path: Path
    iteration: int
    score: float | None


def name_of(iteration: int) -> str:
    return f"iter_{iteration:03d}"


def iteration_of(name: str) -> int:
    """Return the iteration that `name_of` has named."""
    return int(name.removeprefix("iter_"))


def is_name(name: str) -> bool:
    """Return whether a folder of this name is meant as a checkpoint."""
    return _NAME.fullmatch(name) is not None


def held_after(root: Path, iteration: int) -> list[str]:
    """Return the names of the checkpoints in a folder after `iteration` that are held, oldest first."""
    return [path.name for path in _after(root, iteration) if (path / _HELD).exists()]


def _after(root: Path, iteration: int) -> list[Path]:
    named = {iteration_of(path.name): path for path in root.glob("iter_*") if is_name(path.name)}
    return [path for number, path in sorted(named.items()) if number > iteration]


def read(path: Path) -> Checkpoint:
    """Return the checkpoint at `path` after comparing every file with the manifest.

    Raises:
        ModelError: it is absent, incomplete or damaged; the line names the file.
    """
    manifest = _manifest(path)
    if manifest is None:
        raise ModelError(f"checkpoint {str(path)!r}: no whole manifest.json, so it is not a complete checkpoint")
    for name, expected in manifest["files"].items():
        file = path / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ModelError(f"checkpoint {str(path)!r}: manifest.json names {name!r}, which lies outside of it")
        if not file.is_file():
            raise ModelError(f"checkpoint {str(path)!r}: {name} is missing")
        if file.stat().st_size != expected["size"] or _sha256(file) != expected["sha256"]:
            raise ModelError(f"checkpoint {str(path)!r}: {name} differs from its manifest")
    return Checkpoint(path, manifest["iteration"], manifest["score"])


def digest_of_weights(path: Path) -> str:
    """Return what two checkpoints share if their weights are equal, from the manifest."""
    files = (_manifest(path) or {"files": {}})["files"]
    sums = [entry["sha256"] for name, entry in sorted(files.items()) if "/" not in name and name.endswith(_WEIGHTS)]
    return hashlib.sha256("".join(sums).encode()).hexdigest()[:16]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Tell what is wrong with a file of a checkpoint that is read inside the block.

    Raises:
        ModelError: it is none that a run wrote; the line names it.
    """
    try:
        yield
    except WRONG as error:
        raise ModelError(
            f"{path} cannot be read ({type(error).__name__}: {one_line(error)}); allowed: the file as the run wrote it"
        ) from error


class CheckpointStore:
    """The checkpoints of one run in a folder."""

    def __init__(self, root: Path, keep_last: int) -> None:
        self.root, self._keep_last = root, keep_last
        for path in root.glob(".replaced-*"):  # a crash between the two renames of `save`
            final = root / path.name.removeprefix(".replaced-")
            if final.exists():
                shutil.rmtree(path)
            else:
                path.rename(final)

    def remove_leftovers(self) -> None:
        """Remove what a killed process left: checkpoints without a manifest. Only who owns the run may do so."""
        for path in self.root.glob(".writing-*"):
            shutil.rmtree(path)
        for path in self.root.glob("iter_*"):
            if is_name(path.name) and not (path / "manifest.json").exists():
                shutil.rmtree(path)

    def all(self) -> list[Checkpoint]:
        """Return the complete checkpoints, oldest first (files are not re-hashed here)."""
        found = []
        for path in self.root.glob("iter_*") if self.root.is_dir() else ():
            manifest = _manifest(path)
            if manifest is not None and _NAME.fullmatch(path.name):
                found.append(Checkpoint(path, manifest["iteration"], manifest["score"]))
        return sorted(found, key=lambda checkpoint: checkpoint.iteration)

    def best(self) -> Checkpoint | None:
        """Return the one with the highest score, the earliest of equals."""
        scored = [c for c in self.all() if c.score is not None]
        return max(scored, key=lambda c: (c.score, -c.iteration), default=None)

    def save(self, iteration: int, score: float | None, write: Callable[[Path], None]) -> Path:
        """Write a checkpoint through `write(folder)`, replacing one of the same iteration, and return its path."""
        self.root.mkdir(parents=True, exist_ok=True)
        final, scratch = self.root / name_of(iteration), self.root / f".writing-{name_of(iteration)}"
        shutil.rmtree(scratch, ignore_errors=True)  # debris of a crash
        scratch.mkdir()
        try:
            write(scratch)
            files = {
                str(file.relative_to(scratch)): {"size": file.stat().st_size, "sha256": _sha256(file)}
                for file in sorted(scratch.rglob("*"))
                if file.is_file()
            }
            manifest = {"iteration": iteration, "score": score, "files": files}
            write_whole(scratch / "manifest.json", json.dumps(manifest, indent=1), synced=True)
        except Exception:  # a full disk: without this, what comes next finds it full
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        if final.exists():
            replaced = self.root / f".replaced-{name_of(iteration)}"
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
            scratch.rename(final)
            shutil.rmtree(replaced)
        else:
            scratch.rename(final)
        return final

    def set_aside_after(self, iteration: int) -> list[str]:
        """Rename the checkpoints of a branch that a resume from `iteration` abandons; return their former names."""
        names = []
        for path in _after(self.root, iteration):
            abandoned = self.root / f"abandoned-{path.name}"
            shutil.rmtree(abandoned, ignore_errors=True)
            path.rename(abandoned)
            names.append(path.name)
        return names

    def superseded(self) -> list[str]:
        """Return the names of all but the newest, the best and those that are held."""
        checkpoints, best = self.all(), self.best()
        older = [c for c in checkpoints[: -self._keep_last] if best is None or c.iteration != best.iteration]
        return [c.path.name for c in older if not (c.path / _HELD).exists()]

    def hold(self, name: str, by: str) -> None:
        """Keep a checkpoint for good: `by` names it, and would lead nowhere without it."""
        (self.root / name / _HELD).write_text(f"{by}\n")

    def remove(self, name: str) -> None:
        """Delete a checkpoint."""
        (self.root / name / "manifest.json").unlink()  # first, or a kill would leave one that looks whole
        shutil.rmtree(self.root / name)


def _manifest(path: Path) -> dict[str, Any] | None:
    """Return what a manifest says; None where there is none, or another text in its place."""
    try:
        content = json.loads((path / "manifest.json").read_text())
        files, score = content["files"], content["score"]
        right = all(isinstance(entry["size"], int) and isinstance(entry["sha256"], str) for entry in files.values())
        right = right and isinstance(content["iteration"], int) and (score is None or isinstance(score, (int, float)))
    except WRONG:
        return None
    return content if right else None


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
