"""The data sets that a run's problems come from, for its tracking and its first lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from grpo_mlflow.config import Config
from grpo_mlflow.tasks import gsm8k, table
from grpo_mlflow.tasks.tables import places, splits
from grpo_mlflow.types import Split

TAG = "grpo.rows"
"""The tag of a run that tells its rows from others."""
_CONTEXTS: dict[Split, str] = {"train": "training", "eval": "evaluation"}


@dataclass(frozen=True, slots=True)
class DataSet:
    """The rows of one split of a task of rows: `context` is training or evaluation."""

    name: str
    digest: str
    source: str
    context: str
    rows: int


@dataclass(frozen=True, slots=True)
class Table:
    """A task of rows, what is to be said of it, and its data sets."""

    line: str
    data_sets: tuple[DataSet, ...]


def tables(config: Config) -> Iterator[Table]:
    """Yield what the tasks of rows of a config read.

    Raises:
        ConfigError: a task's rows cannot be read.
        UserError: the hub does not give them.
    """
    data = config.data
    if "gsm8k" in data.tasks:
        path = data.gsm8k.path or gsm8k.HUB
        yield _table("gsm8k", gsm8k.load(data.gsm8k.path), path, path)
    if "rows" in data.tasks:
        yield _table("rows", table.load(data.rows), data.rows.path or "", data.rows.eval_path or data.rows.path or "")


def digests(config: Config) -> str | None:
    """Return what tells the rows of a config from others, or None: it has none.

    Raises:
        ConfigError: as `tables`.
        UserError: as `tables`.
    """
    found = [each.digest for table in tables(config) for each in table.data_sets]
    return " ".join(found) or None


def changed(config: Config, tags: Mapping[str, str]) -> bool:
    """Return whether a run with these tags began with other rows than a config has now.

    Raises:
        ConfigError: as `tables`.
        UserError: as `tables`.
    """
    known = tags.get(TAG)
    return known is not None and known != digests(config)


def _table(name: str, found: splits.Splits[Any], path: str, eval_path: str) -> Table:
    sources: dict[Split, str] = {"train": path, "eval": eval_path}
    sets = (
        DataSet(_named(sources[split]), found.digests[split], _address(sources[split]), context, len(found.rows[split]))
        for split, context in _CONTEXTS.items()
    )
    where = path if path == eval_path else f"{path} and {eval_path}"
    return Table(f"{name}: {found.counts()} from {where}", tuple(sets))


def _named(path: str) -> str:
    place = places.local(path)
    return path if place is None else place.absolute().name


def _address(path: str) -> str:
    place = places.local(path)
    return f"https://huggingface.co/datasets/{path.partition(':')[0]}" if place is None else str(place.absolute())
