"""Checksums of a cached folder, so that a damaged one is made again and never used.

The folder of an earlier version has none. It gets those of what it holds: made again, its weights might differ in their
last bits, and adapters that were trained on them would no longer fit.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from grpo_mlflow.errors import ModelError
from grpo_mlflow.model import folder, reading
from grpo_mlflow.runtime.files import lock, write_whole

_NAME = "checksums.json"
log = logging.getLogger(__name__)


def write(path: Path) -> None:
    """Write the sha256 of every file of a folder into it, whole or not at all."""
    write_whole(path / _NAME, json.dumps(_sums(path), indent=1))


def intact(path: Path) -> bool:
    """Return whether a folder is there with every file as it was written; take a damaged one out of the way.

    Several processes may ask at once: only one at a time looks and moves, so that none moves what another has made
    again meanwhile.
    """
    if not path.is_dir():
        return False
    with _alone(path):
        if not path.is_dir():  # another process has just taken it away
            return False
        adopted = not (path / _NAME).exists()
        damage = _unsound(path) if adopted else _damage(path)
        if damage is None:
            if adopted:
                with suppress(OSError):  # a cache that only others may write to
                    write(path)
            return True
        aside = Path(tempfile.mkdtemp(prefix=".damaged-", dir=path.parent))
        path.rename(aside / path.name)
    log.warning("cached model %s: %s; it is made again", path, damage)
    shutil.rmtree(aside, ignore_errors=True)
    return False


def _damage(path: Path) -> str | None:
    """Return what differs from the checksums, None if nothing does."""
    try:
        expected = dict(json.loads((path / _NAME).read_text()))
    except (OSError, ValueError, TypeError):
        return f"{_NAME} cannot be read"
    found = _sums(path)
    wrong = sorted(name for name, digest in expected.items() if found.get(name) != digest)
    return f"{wrong[0]} is {'damaged' if wrong[0] in found else 'missing'}" if wrong else None


def _unsound(path: Path) -> str | None:
    """Return what is wrong with a model's folder that has no checksums, as far as its files show it by themselves."""
    try:
        folder.require_weights(path)
        reading.read_tokenizer(path, trust_remote_code=False)
    except ModelError as error:
        return str(error)
    return None


def _sums(path: Path) -> dict[str, str]:
    sums = {}
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.name != _NAME:
            sums[str(file.relative_to(path))] = hashlib.sha256(file.read_bytes()).hexdigest()
    return sums


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let one process at a time into the block, of those that ask for the same folder."""
    with ExitStack() as held:
        with suppress(OSError):  # a cache that only others may write to, or a file system without locks
            file = held.enter_context((path.parent / f".{path.name}.lock").open("w"))
            lock(file.fileno(), waits=True)
        yield
