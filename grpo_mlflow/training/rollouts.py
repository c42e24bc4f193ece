"""From problems to groups: generate, verify, compute advantages."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grpo_mlflow import seeding
from grpo_mlflow.algorithm.advantages import DIGITS, completed, group_advantages, normalized_then_summed
from grpo_mlflow.algorithm.names import MultiObjective, Scale
from grpo_mlflow.errors import ConfigError, PromptTooLong, TextUntried, UserError
from grpo_mlflow.generation import Generator, Pricing, Sampling, Streaming, Telling
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.runtime.processes import Processes
from grpo_mlflow.tasks import Pending, Posed, Task
from grpo_mlflow.types import Completion, Group, Problem, Prompt, Rollout, Verdict


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
    *,
    k: int,
    sampling: Sampling,
    seed: int,
    key: tuple[str | int, ...],
    training: bool = True,
) -> list[list[Rollout]]:
    """Return K judged completions for each problem; `training` as in `judge`.

    Raises:
        PromptTooLong: the model has too few positions for one of them.
    """
    prompts = render(policy, problems, sampling.max_new_tokens)
    sampled, pending = _drawn(task, problems, generator, prompts, k, sampling, seed, key)
    return _judged(task, prompts, sampled, lambda: [verdict for wait in pending for verdict in wait()], training)


def _drawn(
    task: Task,
    problems: Sequence[Problem],
    generator: Generator,
    prompts: Sequence[Prompt],
    *asked: Any,
) -> tuple[list[list[Completion]], list[Pending]]:
    """Return completions, and what waits for their verdicts: judged while others are sampled, if the generator can."""
    if isinstance(generator, Streaming):
        sampled: list[list[Completion]] = []
        pending: list[Pending] = []
        for batch in generator.stream(prompts, *asked):
            pending.append(begin(task, problems[len(sampled) : len(sampled) + len(batch)], batch))
            sampled += batch
        return sampled, pending
    if not isinstance(generator, Telling):
        sampled = generator.generate(prompts, *asked)
        return sampled, [begin(task, problems, sampled)]
    begun: dict[int, tuple[list[str], Pending]] = {}

    def drawn(place: int, found: Sequence[tuple[tuple[int, ...], str]]) -> None:
        # nothing but the text and its tokens is looked at, and only the text decides a verdict
        row = [Completion(ids, text, (), "stop", 0) for ids, text in found]
        begun[place] = [each.text for each in row], begin(task, [problems[place]], [row])

    sampled = generator.tell(prompts, *asked, drawn=drawn)
    pending = []
    for place, (problem, row) in enumerate(zip(problems, sampled, strict=True)):
        texts, wait = begun.get(place, (None, None))
        is_same = wait is not None and texts == [completion.text for completion in row]  # else it was drawn again
        pending.append(wait if wait is not None and is_same else begin(task, [problem], [row]))
    return sampled, pending


def render(policy: Policy, problems: Sequence[Problem], new: int) -> list[Prompt]:
    """Return the prompts of problems that completions of at most `new` tokens will follow.

    Raises:
        PromptTooLong: the model has too few positions for one of them. Beyond its last one a model fails in many ways.
        TextUntried: the model was not tried with so many tokens.
    """
    prompts = [policy.prompt(problem) for problem in problems]
    for problem, prompt in zip(problems, prompts, strict=True):
        if lack := lacks_room(policy, prompt, new):
            line = f"max_new_tokens = {new}: {lack}. Neither can change on resume, but in a new run from the checkpoint"
            raise PromptTooLong(line, problem.seed, (policy.positions or 0) - len(prompt.token_ids))
        require_tried(policy, len(prompt.token_ids) + new, f"the prompt of {prompt.problem_id} and its completion")
    return prompts


def lacks_room(policy: Policy, prompt: Prompt, new: int) -> str | None:
    """Return why the model has too few positions for a prompt and `new` tokens more; None: it has enough."""
    length, positions = len(prompt.token_ids), policy.positions
    if positions is None or length + new <= positions:
        return None
    shorter = f"{positions - length} or less, or " if positions > length else ""
    return (
        f"the prompt of {prompt.problem_id} has {length} tokens, and the model {positions} positions for it and its "
        f"completion; allowed: {shorter}a model with more positions"
    )


def require_tried(policy: Policy, tokens: int, what: str) -> None:
    """Refuse a text of so many tokens that the model was not made for or not tried with.

    Raises:
        UserError: it has fewer positions.
        TextUntried: it computes such texts in another way than those that it was tried with.
    """
    if policy.positions is not None and tokens > policy.positions:
        raise UserError(
            f"{what}: {tokens} tokens together, and model {policy.name!r} has {policy.positions} positions; allowed: a "
            "model with more positions"
        )
    if policy.longest is not None and tokens > policy.longest:
        raise TextUntried(
            f"{what}: up to {tokens} tokens together; beyond {policy.longest} the model computes in another way (a "
            "window, a chunk, stretched angles), which was not tried, since what the run met first was shorter; "
            "allowed: to resume the run, which tries it before it goes on"
        )


def judge(
    task: Task,
    problems: Sequence[Problem],
    prompts: Sequence[Prompt],
    sampled: Sequence[Sequence[Completion]],
    training: bool = True,
) -> list[list[Rollout]]:
    """Return the completions of each problem with the task's verdict on each.

    With `training` verdicts are as the run's task wants them for that (`Posed.trained`).
    """
    return _judged(task, prompts, sampled, begin(task, problems, sampled), training)


def begin(task: Task, problems: Sequence[Problem], sampled: Sequence[Sequence[Completion]]) -> Pending:
    """Begin to judge the completions of each problem; what is returned waits for the verdicts on all, in order."""
    asked = [problem for problem, row in zip(problems, sampled, strict=True) for _ in row]
    return task.begin(asked, [completion for row in sampled for completion in row])


def _judged(
    task: Task,
    prompts: Sequence[Prompt],
    sampled: Sequence[Sequence[Completion]],
    pending: Pending,
    training: bool,
) -> list[list[Rollout]]:
    own = task.trained if training and isinstance(task, Posed) else None
    verdicts = iter(pending())

    def rollout(prompt: Prompt, completion: Completion) -> Rollout:
        verdict = next(verdicts)
        return Rollout(prompt, completion, own(verdict, completion) if own else verdict)

    return [
        [rollout(prompt, completion) for completion in completions]
        for prompt, completions in zip(prompts, sampled, strict=True)
    ]


def priced(
    generator: Generator, rows: Sequence[Sequence[Rollout]], sampling: Sampling, processes: Processes
) -> list[list[Rollout]]:
    """Return rollouts with the log-probabilities that their generator leaves to all processes together, if it does.

    Raises:
        ServerFailed: completions of a prompt were not drawn one by one.
    """
    if not isinstance(generator, Pricing) or not generator.prices_together():
        return [list(row) for row in rows]
    ids = [[rollout.completion.token_ids for rollout in row] for row in rows]
    with processes.collective(common=False):
        prices = generator.prices(
            [(row[0].prompt.token_ids, own) for row, own in zip(rows, ids, strict=True)], sampling
        )

    def checked() -> None:
        for own, values in zip(ids, prices, strict=True):
            generator.require_drawn_apart(own, values, sampling)

    processes.agreed(checked)
    return [
        [
            replace(rollout, completion=replace(rollout.completion, behaviour_logprobs=value))
            for rollout, value in zip(row, values, strict=True)
        ]
        for row, values in zip(rows, prices, strict=True)
    ]


def form_groups(
    problems: Sequence[Problem],
    rollouts: Sequence[Sequence[Rollout]],
    scale: Scale,
    objectives: MultiObjective = "sum_then_normalize",
) -> list[Group]:
    """Return the groups with their advantages; what takes a batch takes the rewards given here.

    A reward that does not apply to a rollout leaves its advantage to the others (`advantages.completed`).

    Raises:
        ConfigError: `scale` is `mean`, and a reward is below 0.
    """
    verdicts = [[rollout.verdict for rollout in row] for row in rollouts]
    if objectives == "normalize_then_sum":
        names, values = _table(verdicts, lambda verdict: verdict.values or {"reward": verdict.reward})
        weights = [[[(verdict.weights or {}).get(name, 1.0) for name in names] for verdict in row] for row in verdicts]
        advantages = normalized_then_summed(values, np.array(weights))
    else:
        scored = np.array([[_is_scored(verdict) for verdict in row] for row in verdicts])
        rewards = _sums(verdicts)
        if scale == "mean":
            _require_none_below_zero(problems, rewards, scored)
        advantages = group_advantages(rewards, scale, scored)
    return [
        Group(problem, tuple(row), tuple(own))
        for problem, row, own in zip(problems, rollouts, advantages.tolist(), strict=True)
    ]


def _require_none_below_zero(
    problems: Sequence[Problem], rewards: NDArray[np.float64], scored: NDArray[np.bool_]
) -> None:
    for place, rollout in zip(*np.nonzero(scored & (rewards.round(DIGITS) < 0)), strict=True):
        raise ConfigError(
            f"train.scale_rewards = 'mean': a completion of {problems[place].id} has the reward "
            f"{rewards[place, rollout]:g}, but advantages are divided by a mean of rewards of 0 or more; allowed: such "
            "rewards, or a new run with another train.scale_rewards"
        )


def _sums(verdicts: Sequence[Sequence[Verdict]]) -> NDArray[np.float64]:
    """Return the rewards (G, K), with the group's mean of a part in the place of one that does not apply."""
    rewards = np.array([[verdict.reward for verdict in row] for row in verdicts])
    lacking = [g for g, row in enumerate(verdicts) if any(None in (v.values or {}).values() for v in row)]
    if lacking:
        _, parts = _table([verdicts[g] for g in lacking], _parts)
        rewards[lacking] = completed(parts).sum(axis=2)
    return rewards


def _is_scored(verdict: Verdict) -> bool:
    """Return whether any reward applies to a completion; a penalty of training alone is none."""
    return verdict.values is None or any(value is not None for value in verdict.values.values())


def _parts(verdict: Verdict) -> dict[str, float | None]:
    return {**dict.fromkeys(verdict.values or {}), **verdict.parts}


def _table(
    verdicts: Sequence[Sequence[Verdict]], of: Callable[[Verdict], Mapping[str, float | None]]
) -> tuple[list[str], NDArray[np.float64]]:
    """Return the names of what verdicts hold, and its numbers (G, K, names): NaN where one has none."""
    found = [[of(verdict) for verdict in row] for row in verdicts]
    names = list(dict.fromkeys(name for row in found for each in row for name in each))
    table = [[[each.get(name) for name in names] for each in row] for row in found]
    return names, np.array(table, dtype=np.float64)
