"""Which problems are the same: two seeds may give one content, which is no second problem to measure.

Two problems are the same if a model is asked the same and judged by the same, so by messages and payload. Case and
white space make no other message. Keys of the payload that start with an underscore say where a task finds a problem
again, and make no other problem. An interval over 256 copies of 9 problems would be that of 256.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence

from grpo_mlflow.config import Config
from grpo_mlflow.tasks.base import Task, folded
from grpo_mlflow.types import Problem, Split

_LEAST = 2  # fewer problems have no interval to speak of
_SECONDS = 1.0  # that a run may look for training problems among those of its evaluation


def content(problem: Problem) -> str:
    """Return what makes a problem: equal for two that are asked and judged alike."""
    messages = [{key: folded(str(text)) for key, text in message.items()} for message in problem.messages]
    parts = [messages, {key: value for key, value in problem.payload.items() if not str(key).startswith("_")}]
    return json.dumps(parts, sort_keys=True, default=repr)


def distinct(problems: Iterable[Problem], known: Iterable[Problem] = ()) -> list[Problem]:
    """Return the first problem of each content, in order, without those whose content is known."""
    seen = {content(problem) for problem in known}
    found = []
    for problem in problems:
        key = content(problem)
        if key not in seen:
            seen.add(key)
            found.append(problem)
    return found


def evaluation_problems(task: Task, config: Config, before: Sequence[range] = ()) -> tuple[list[Problem], str | None]:
    """Return the different problems of `eval.num_ids` seeds without those of the evaluation seeds `before`.

    Where that leaves fewer than two, the task has no fresh ones, and those that are known are returned. The line says
    so, or how many problems there are where they are fewer than the seeds.
    """
    count = config.eval.num_ids
    asked, fresh = _asked(task, config, before)
    start = f"eval.num_ids = {count}:"
    if len(fresh) < _LEAST and before:
        return asked, f"{start} the task has no fresh problems; {len(asked)} that were evaluated before count again"
    which = "different problems that were not evaluated before" if before else "different problems"
    return fresh, f"{start} {len(fresh)} {which}; each counts once" if len(fresh) < count else None


def has_fresh(task: Task, config: Config, before: Sequence[range]) -> bool:
    """Return whether `evaluation_problems` are fresh."""
    return len(_asked(task, config, before)[1]) >= _LEAST


def _asked(task: Task, config: Config, before: Sequence[range]) -> tuple[list[Problem], list[Problem]]:
    """Return the different problems of `eval.num_ids` seeds, and those of them that no seed of `before` has."""
    first, count = config.eval.id_seed_start, config.eval.num_ids
    asked = distinct(_of(task, range(first, first + count)))
    known = (problem for seeds in before for problem in _of(task, seeds))
    return asked, distinct(asked, known) if before else asked


def remarks(task: Task, config: Config) -> list[str]:
    """Return what a run says of its evaluation problems at its start: that they repeat, or are training problems."""
    shared = overlap(task, config) if config.data.source == "live" else None  # else others are trained on
    return [line for line in (evaluation_problems(task, config)[1], shared) if line is not None]


def overlap(task: Task, config: Config, seconds: float = _SECONDS) -> str | None:
    """Return a line on how many evaluation problems are also training problems; None: not one of those looked at.

    Making problems may be slow, so no more than what `seconds` allow are looked at.
    """
    asked = {content(problem) for problem in evaluation_problems(task, config)[0]}
    first, count = config.data.train_seed_start, config.data.num_train_seeds
    until, looked = time.monotonic() + seconds, 0
    shared: set[str] = set()
    for problem in _of(task, range(first, first + count), "train"):
        looked += 1
        if (key := content(problem)) in asked:
            shared.add(key)
        if time.monotonic() > until:
            break
    if not shared:
        return None
    bounded = f" (at least: {looked} of {count} training problems were looked at)" if looked < count else ""
    return f"{len(shared)} of {len(asked)} evaluation problems are also training problems{bounded}"


def _of(task: Task, seeds: range, split: Split = "eval") -> Iterator[Problem]:
    return (task.problem(split, seed) for seed in seeds)
