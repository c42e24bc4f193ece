"""The data sets that a run's problems come from, for its tracking and its first lines."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from grpo_mlflow import tasks
from grpo_mlflow.config import Config
from grpo_mlflow.tasks import contents, gsm8k, table
from grpo_mlflow.tasks.settings import task_settings
from grpo_mlflow.tasks.tables import places, splits
from grpo_mlflow.types import Split

TAG = "grpo.rows"
"""The tag of a run that tells its rows from others."""
EVALUATION = "evaluation"
_CONTEXTS: dict[Split, str] = {"train": "training", "eval": EVALUATION}
GENERATED = "generated"
"""The type of the source of problems that a task makes."""
_OF_ROWS = ("gsm8k", "rows")


@dataclass(frozen=True, slots=True)
class DataSet:
    """Problems as MLflow shows them: `context` is training or evaluation, `profile` has `num_rows` and other counts.

    `digest` is of their content, or of what decides that where they are too many to look at.
    """

    name: str
    digest: str
    context: str
    source_type: str
    source: Mapping[str, Any]
    profile: Mapping[str, Any]


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


def used(config: Config, kind: str) -> tuple[DataSet, ...]:
    """Return the data sets of a run of this kind: an evaluation trains on none, and training need not evaluate.

    Raises:
        ConfigError: as `tables`.
        UserError: as `tables`.
    """
    contexts = [
        context
        for context, needed in (("training", kind != "evaluate"), (EVALUATION, _measures(config, kind)))
        if needed
    ]
    found = [*_posed(config), *(each for table in tables(config) for each in table.data_sets)]
    if config.data.source != "live":
        found = [_recorded(config), *(each for each in found if each.context == EVALUATION)]
    return tuple(each for each in found if each.context in contexts)


def _measures(config: Config, kind: str) -> bool:
    return config.eval.enabled or kind == "evaluate"


def _posed(config: Config) -> Iterator[DataSet]:
    """Yield the problems that a task makes by itself, or draws from several tasks; none of one that reads rows."""
    data, evaluation = config.data, config.eval
    if data.task in _OF_ROWS:
        return
    decides, name = task_settings(config), " + ".join(sorted(data.tasks))
    source = {"task": data.task, **decides}
    # in the profile as well: MLflow's page of a data set shows no source of such a type
    told = {"settings": " ".join(f"{key}={json.dumps(value)}" for key, value in decides.items())}
    train = {"num_rows": data.num_train_seeds, "seed_start": data.train_seed_start, **told}
    yield DataSet(f"{name} train", _short([decides, train]), "training", GENERATED, source, train)
    problems, _ = contents.evaluation_problems(tasks.of(config), config)
    seeds = {"seed_start": evaluation.id_seed_start, "num_seeds": evaluation.num_ids}
    held_out = {"num_rows": len(problems), **seeds, **told}
    digest = _short(sorted(contents.content(problem) for problem in problems))
    yield DataSet(f"{name} eval", digest, EVALUATION, GENERATED, source, held_out)


def _recorded(config: Config) -> DataSet:
    """Return the rollouts that another run has kept, which this one trains on instead of its own."""
    data = config.data
    run_id = data.source.removeprefix("runs:/")
    groups = {"problems_per_iteration": data.problems_per_iteration, "rollouts_per_problem": data.rollouts_per_problem}
    profile = {"num_rows": config.train.iterations * config.rollouts_per_iteration, **groups}
    source = {"uri": f"runs:/{run_id}/rollouts", "run_id": run_id}
    return DataSet(f"rollouts of {run_id[:8]}", run_id, "training", "run", source, profile)


def _short(content: object) -> str:
    """Return a digest as short as MLflow's own."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True, default=repr).encode(), digest_size=4).hexdigest()


def _table(name: str, found: splits.Splits[Any], path: str, eval_path: str) -> Table:
    sources: dict[Split, str] = {"train": path, "eval": eval_path}
    sets = (
        DataSet(
            _named(sources[split]),
            found.digests[split],
            context,
            *place(sources[split]),
            profile={"num_rows": len(found.rows[split])},
        )
        for split, context in _CONTEXTS.items()
    )
    where = path if path == eval_path else f"{path} and {eval_path}"
    return Table(f"{name}: {found.counts()} from {where}", tuple(sets))


def _named(path: str) -> str:
    place = places.local(path)
    return path if place is None else place.absolute().name


def place(path: str) -> tuple[str, dict[str, str]]:
    """Return the type of a source of rows and the source, as MLflow has them."""
    if (found := places.local(path)) is not None:
        return "local", {"uri": str(found.absolute())}
    name, _, config = path.partition(":")
    return "hugging_face", {"path": name, **({"config_name": config} if config else {})}
