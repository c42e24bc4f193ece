"""From problems to groups: generate, verify, compute advantages; and groups to a file and back."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter
from pydantic_core import PydanticSerializationError, to_json

from grpo_mlflow import interrupts, seeding
from grpo_mlflow.advantages import Scale, group_advantages
from grpo_mlflow.config import GenerationConfig
from grpo_mlflow.generation import Generator, Sampling
from grpo_mlflow.policy import Policy
from grpo_mlflow.statistics import mean
from grpo_mlflow.tasks import Posed, Task, member_of
from grpo_mlflow.types import Completion, Group, Problem, Prompt, Rollout, Verdict


def _getter(kind: type) -> tuple[list[str], Any]:
    names = [field.name for field in fields(kind)]
    return names, attrgetter(*names)


_FIELDS = {kind: _getter(kind) for kind in (Problem, Completion, Verdict)}
_TO_JSON = {kind: TypeAdapter(kind).serializer.to_json for kind in (Completion, Verdict)}


def training_sampling(config: GenerationConfig) -> Sampling:
    """Return how training completions are drawn."""
    return Sampling(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        repetition_penalty=config.repetition_penalty,
    )


def seeds_of_iteration(first: int, count: int, per_iteration: int, iteration: int, seed: int) -> list[int]:
    """Return the problem seeds of an iteration: passes over the seeds, each in its own shuffled order.

    A pass ends where its rest would not fill an iteration, so that no iteration holds a problem twice.
    """
    epoch, place = divmod(iteration, count // per_iteration)
    order = seeding.stream(seed, "order", epoch).permutation(count)
    return [first + int(n) for n in order[place * per_iteration : (place + 1) * per_iteration]]


def further_seeds(first: int, count: int, taken: Collection[int], iteration: int, seed: int) -> list[int]:
    """Return all problem seeds but those `taken`, in an order of the iteration's own."""
    order = seeding.stream(seed, "resample", iteration).permutation(count)
    return [first + int(n) for n in order if first + int(n) not in taken]


def collect(
    task: Task,
    policy: Policy,
    generator: Generator,
    problems: Sequence[Problem],
    k: int,
    sampling: Sampling,
    seed: int,
    key: tuple[str | int, ...],
    training: bool = True,
) -> list[list[Rollout]]:
    """Return K judged completions for each problem; `training` as in `judge`."""
    prompts = [policy.prompt(problem) for problem in problems]
    return judge(task, problems, prompts, generator.generate(prompts, k, sampling, seed, key), training)


def judge(
    task: Task,
    problems: Sequence[Problem],
    prompts: Sequence[Prompt],
    sampled: Sequence[Sequence[Completion]],
    training: bool = True,
) -> list[list[Rollout]]:
    """Return the completions of each problem with the task's verdict on each.

    With `training` a completion that runs too long costs what the run's task asks for that.
    """
    overlong = task.overlong if training and isinstance(task, Posed) else None

    def verdict(problem: Problem, completion: Completion) -> Verdict:
        with interrupts.deferred():  # a judge may catch whatever is raised in it, and go on
            judged = task.verify(problem, completion.text)
        return overlong.penalise(judged, completion) if overlong else judged

    return [
        [Rollout(prompt, completion, verdict(problem, completion)) for completion in completions]
        for problem, prompt, completions in zip(problems, prompts, sampled, strict=True)
    ]


def form_groups(problems: Sequence[Problem], rollouts: Sequence[Sequence[Rollout]], scale: Scale) -> list[Group]:
    """Return the groups with their advantages; `batch` scaling takes the rewards given here as its batch."""
    rewards = np.array([[rollout.verdict.reward for rollout in row] for row in rollouts])
    advantages = group_advantages(rewards, scale)
    return [
        Group(problem, tuple(row), tuple(values))
        for problem, row, values in zip(problems, rollouts, advantages.tolist(), strict=True)
    ]


def write(path: Path, groups: Sequence[Group]) -> None:
    """Write one JSON object per group: the problem, and all that each rollout holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
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
        completion = _TO_JSON[Completion](rollout.completion, warnings=False)
        return completion[:-1] + b',"verdict":' + _TO_JSON[Verdict](rollout.verdict, warnings=False) + b"}"
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
    record["verdict"] = _shallow(rollout.verdict)
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


def tokens(groups: Sequence[Group]) -> int:
    """Return how many tokens were sampled."""
    return sum(len(rollout.completion.token_ids) for group in groups for rollout in group.rollouts)


def metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Return what the rollouts say before any update: rewards, advantages, lengths.

    Of a mix also each task's own rewards and rates, as `TASK/success_rate` and so on.
    """
    judged = [rollout for group in groups for rollout in group.rollouts]
    lengths = [len(rollout.completion.token_ids) for rollout in judged]
    of_tasks: dict[str, list[Rollout]] = {}
    for group in groups:
        if name := member_of(group.problem.id):
            of_tasks.setdefault(name, []).extend(group.rollouts)
    return {
        **_rewards(judged),
        **advantage_metrics(groups),
        "completion_length_mean": mean(lengths),
        "completion_length_max": float(max(lengths)),
        "truncated_frac": mean([rollout.completion.finish_reason == "length" for rollout in judged]),
        "flat_group_frac": mean([group.is_flat for group in groups]),
        **{f"{name}/{key}": value for name, own in sorted(of_tasks.items()) for key, value in _rewards(own).items()},
    }


def advantage_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Return the mean and the standard deviation of the advantages of groups."""
    advantages = [value for group in groups for value in group.advantages]
    return {"advantage_mean": mean(advantages), "advantage_std": _std(advantages)}


def _rewards(judged: Sequence[Rollout]) -> dict[str, float]:
    """Return the reward and its parts (0 where a rollout lacks one), and the shares right and well formed."""
    rewards = [rollout.verdict.reward for rollout in judged]
    parts = {name for rollout in judged for name in rollout.verdict.parts}
    return {
        "reward_mean": mean(rewards),
        "reward_std": _std(rewards),
        **{f"reward_{part}": mean([r.verdict.parts.get(part, 0.0) for r in judged]) for part in sorted(parts)},
        "success_rate": mean([rollout.verdict.success for rollout in judged]),
        "format_rate": mean([rollout.verdict.parsed is not None for rollout in judged]),
    }


def _std(values: Sequence[float]) -> float:
    centre = mean(values)
    return math.sqrt(sum((value - centre) ** 2 for value in values) / len(values))
