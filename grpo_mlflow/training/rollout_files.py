"""Groups to a file and back: one JSON object a line for each group."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from operator import attrgetter
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic_core import PydanticSerializationError, to_json

from grpo_mlflow.runtime.files import replacing
from grpo_mlflow.types import Completion, Group, Problem, Prompt, Rollout, Verdict


def _getter(kind: type) -> tuple[list[str], Any]:
    names = [field.name for field in fields(kind)]
    return names, attrgetter(*names)


_FIELDS = {kind: _getter(kind) for kind in (Problem, Completion, Verdict)}


_TO_JSON = {kind: TypeAdapter(kind).serializer.to_json for kind in (Completion, Verdict)}


def write(path: Path, groups: Sequence[Group]) -> None:
    """Write one JSON object per group: the problem, and all that each rollout holds."""
    with replacing(path) as stream:
        for group in groups:
            stream.write(
                b'{"problem": %b, "prompt_token_ids": %b, "advantages": %b, "rollouts": [%b]}\n'
                % (
                    # a payload that JSON cannot hold must be refused, and not be written as something like it
                    json.dumps(_shallow(group.problem)).encode(),
                    to_json(group.rollouts[0].prompt.token_ids),
                    to_json(group.advantages, inf_nan_mode="constants"),
                    b",".join([_json(rollout) for rollout in group.rollouts]),
                )
            )


def _json(rollout: Rollout) -> bytes:
    """Return `record_of` as `json` would, in an eighth of its time: an iteration may hold a million log-probs."""
    try:
        # what has its default is left out: `trained`, where all tokens are
        completion = _TO_JSON[Completion](rollout.completion, warnings=False, exclude_defaults=True)
        verdict = _TO_JSON[Verdict](rollout.verdict, warnings=False, exclude_defaults=True)
        return completion[:-1] + b',"verdict":' + verdict + b"}"
    except PydanticSerializationError:  # half of a surrogate pair, which only an escape can write
        return json.dumps(record_of(rollout)).encode()


def read(path: Path) -> list[Group]:
    """Read what `write` wrote."""
    groups = []
    for line in path.read_bytes().splitlines():
        record = json.loads(line)
        problem = Problem(**{**record["problem"], "messages": tuple(record["problem"]["messages"])})
        prompt = Prompt(problem.id, problem.messages, tuple(record["prompt_token_ids"]))
        rollouts = [rollout_of(prompt, item) for item in record["rollouts"]]
        groups.append(Group(problem, tuple(rollouts), tuple(record["advantages"])))
    return groups


def record_of(rollout: Rollout) -> dict[str, Any]:
    """Return a rollout without its prompt as JSON can hold it."""
    record = _shallow(rollout.completion)
    if rollout.completion.trained is None:
        del record["trained"]
    verdict = _shallow(rollout.verdict)
    for name in ("values", "weights"):
        if verdict[name] is None:
            del verdict[name]
    record["verdict"] = verdict
    return record


def _shallow(record: Problem | Completion | Verdict) -> dict[str, Any]:
    """Return the fields as they are: `asdict` copies every token on its own."""
    names, values = _FIELDS[type(record)]
    return dict(zip(names, values(record), strict=True))


def rollout_of(prompt: Prompt, record: Mapping[str, Any]) -> Rollout:
    """Return what `record_of` was given."""
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}
    verdict = Verdict(**values.pop("verdict"))
    return Rollout(prompt, Completion(**values), verdict)
