"""A few training problems asked and judged as the run would: what the doctor shows of prompts and rewards."""

from __future__ import annotations

from collections.abc import Iterator

from grpo_mlflow.config import Config
from grpo_mlflow.errors import ConfigError
from grpo_mlflow.generation import Generator, training_sampling
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.runs.server_checks import Caution
from grpo_mlflow.tasks import Task, data_sets
from grpo_mlflow.training import rollouts
from grpo_mlflow.types import Problem, Rollout, Verdict

_PROBLEMS = 3
_SHOWN = 400  # characters of a prompt or a completion: its beginning and its end


def show(config: Config, task: Task, actor: Policy, generator: Generator) -> str:
    """Return lines with the prompt, the completion and the rewards of a few problems.

    Raises:
        UserError: one of them cannot be asked or judged.
        Caution: the answer that the task gives itself is no success.
    """
    first = config.data.train_seed_start
    count = min(_PROBLEMS, config.data.num_train_seeds)
    problems = [task.problem("train", seed) for seed in range(first, first + count)]
    sampling = training_sampling(config.generation)
    judged = rollouts.collect(task, actor, generator, problems, k=1, sampling=sampling, seed=0, key=("doctor",))
    lines = [table.line for table in data_sets.tables(config)] or [f"{len(problems)} of {config.data.task}"]
    missed = 0
    for problem, (rollout,) in zip(problems, judged, strict=True):
        own = _own(task, problem)
        missed += own is not None and not own[1].success
        lines += _of_one(problem, rollout, own)
    if missed:
        remedy = f"see why the right answer of {missed} of them is no success: a model that gives it learns nothing"
        raise Caution("\n".join(lines), remedy)
    return "\n".join(lines)


def _own(task: Task, problem: Problem) -> tuple[str, Verdict] | None:
    """Return the task's own answer and its verdict, or None where it has none."""
    try:
        answer = task.reference_answer(problem)
    except ConfigError:
        return None
    return answer, task.verify(problem, answer)


def _of_one(problem: Problem, rollout: Rollout, own: tuple[str, Verdict] | None) -> Iterator[str]:
    completion = rollout.completion
    tokens = f"{len(completion.token_ids)} tokens{', cut off' if completion.finish_reason == 'length' else ''}"
    yield f"- {problem.id}"
    for message in problem.messages:
        yield f"  {message['role']:<11}{_short(message['content'])}"
    yield f"  {'completion':<11}{_short(completion.text)} ({tokens})"
    yield f"  {'rewards':<11}{_rewards(rollout.verdict)}"
    if own is not None:
        yield f"  {'its answer':<11}{_short(own[0])}: {_rewards(own[1])}"


def _rewards(verdict: Verdict) -> str:
    parts = ", ".join(f"{name} {value:.3g}" for name, value in verdict.parts.items())
    return f"{verdict.reward:.3g} ({parts}), {'success' if verdict.success else 'no success'}"


def _short(text: str) -> str:
    text = repr(text)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"
