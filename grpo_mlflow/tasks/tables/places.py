"""Where rows lie: a file, a folder, or the hub; and which of its files a name makes training or evaluation files.

Whole words of a file's name count, in any case: `Test.JSONL` and `my-test-v2.csv` are test files, `latest.jsonl` is
none. Without a test file a validation file is evaluated; with one it is left out.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from grpo_mlflow.errors import ConfigError, UserError, one_line
from grpo_mlflow.tasks.tables import records

_NAMES = {
    "train": {"train", "training"},
    "test": {"test", "testing"},
    "validation": {"validation", "valid", "val", "dev", "eval", "evaluation"},
}
_DESCRIBE = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}  # of the hub: no rows
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


Numbered = Iterator[tuple[str, Any]]
"""Records, each with words that tell where it stands."""


@dataclass(frozen=True, slots=True)
class Part:
    """A file, or a split of the hub: its name without ending, and what gives its records."""

    name: str
    read: Callable[[], Numbered]


def apart(parts: Sequence[Part]) -> tuple[Sequence[Part], Sequence[Part]]:
    """Return the parts that are trained on and those that are evaluated; none of these: their names tell nothing.

    Where some are for evaluation and none for training, all whose names tell nothing are trained on.
    """
    told: dict[str, list[Part]] = {split: [] for split in (*_NAMES, "")}
    for part in parts:
        told[split_named(part.name) or ""].append(part)
    held_out = told["test"] or told["validation"]
    train = told["train"] or (told[""] if held_out else [])
    return (train, held_out) if train and held_out else (parts, [])


def split_named(name: str) -> str | None:
    """Return the split that the words of a name tell: test of gsm8kTest-00000, none of latest."""
    parted = re.sub("(?<=[a-z0-9])(?=[A-Z])", " ", name)
    words = set(re.findall("[a-z]+", parted.lower()))
    splits = [split for split, names in _NAMES.items() if words & names]
    return splits[0] if splits and (splits[0] != "train" or len(splits) == 1) else None


def local(path: str) -> Path | None:
    """Return the file or folder that a text names; None where there is none."""
    found = os.path.expanduser(path)
    return Path(found) if os.path.exists(found) else None


def parts_of(key: str, path: str, suffixes: Sequence[str], inner: str) -> list[Part]:
    """Return the files with rows at a path: itself, those in it, or else those in its folder `inner`; or the splits of
    a data set of the hub, where there is no such path.

    Raises:
        ConfigError: there are none.
        UserError: the hub does not give it.
    """
    place = local(path)
    if place is None:
        if HUB_ID.fullmatch(path):
            return hub_parts(key, path)
        raise ConfigError(f"{key} = {path!r}: no such folder or file")
    for folder in (place, place / inner):
        files = [folder] if folder.is_file() else sorted(folder.glob("*"))
        files = [file for file in files if file.suffix.lower() in suffixes and file.is_file()]
        if files := [file for file in files if file.name not in _DESCRIBE]:
            return [Part(file.stem, partial(_of_file, key, file)) for file in files]
    allowed = f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"
    raise ConfigError(f"{key} = {path!r}: holds no rows; allowed: files that end in {allowed}")


def hub_parts(key: str, name: str) -> list[Part]:
    """Return the splits of a data set of the hub, `ORG/NAME` or `ORG/NAME:CONFIG`.

    Raises:
        UserError: the hub does not give it.
    """
    path, _, config = name.partition(":")
    try:
        found = importlib.import_module("datasets").load_dataset(path, *([config] if config else []))
        splits: dict[str, Iterable[Any]] = dict(found.items())
    except Exception as error:  # whatever the hub or the network does
        raise UserError(f"{key}: {path} cannot be loaded: {one_line(error)}") from error
    return [Part(split, partial(_of_hub, f"{key}: {name}: {split}", rows)) for split, rows in splits.items()]


def _of_file(key: str, file: Path) -> Numbered:
    """Yield the records of a file; raise ConfigError where it cannot be read."""
    try:
        for row, record in records.read(file):
            yield f"{key}: {file.name}: row {row}", record
    except records.Unreadable as error:
        raise ConfigError(f"{key}: {file.name}: cannot be read: {error}") from None


def _of_hub(start: str, rows: Iterable[Any]) -> Numbered:
    """Yield the records of a split of the hub; raise ConfigError where one is none."""
    for row, record in enumerate(rows, start=1):
        try:
            yield f"{start}: row {row}", records.plain(record)
        except records.Unreadable as error:
            raise ConfigError(f"{start}: row {row} cannot be read: {error}") from None


def stamp(path: str, inner: str) -> object:
    """Return what changes when the files at a path do."""
    place = local(path)
    if place is None:
        return path
    files = [place] if place.is_file() else sorted([*place.glob("*"), *(place / inner).glob("*")])
    files = [file for file in files if file.exists()]  # a link may lead nowhere
    return str(place.absolute()), tuple((str(file), (at := file.stat()).st_mtime_ns, at.st_size) for file in files)
