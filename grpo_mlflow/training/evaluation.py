"""How good is a model: fixed problems, several completions each, with intervals over problems.

The same problems and the same random draws serve every evaluation, so two evaluations can be compared problem by
problem.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from grpo_mlflow.algorithm.statistics import Estimate, mean, mean_at_k, mean_interval, pass_at_k, rate_interval
from grpo_mlflow.config import Config
from grpo_mlflow.errors import UserError, one_line
from grpo_mlflow.generation import Generator, Sampling, training_sampling, weights
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.runtime.files import replacing
from grpo_mlflow.runtime.processes import Processes
from grpo_mlflow.tasks import Task, contents, member_of
from grpo_mlflow.tracking import Tracker
from grpo_mlflow.training.checkpoint import name_of
from grpo_mlflow.training.rollout_files import record_of, rollout_of
from grpo_mlflow.training.rollouts import collect, priced
from grpo_mlflow.types import Problem, Prompt, Rollout


@dataclass(frozen=True, slots=True)
class Outcome:
    """One problem: its judged completions, the greedy one where asked for, and the success rate of a random answer."""

    problem_id: str
    rollouts: tuple[Rollout, ...]
    greedy: Rollout | None
    chance: float

    @property
    def successes(self) -> int:
        return sum(rollout.verdict.success for rollout in self.rollouts)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All outcomes of one evaluation, in the order of the problem seeds."""

    outcomes: tuple[Outcome, ...]
    ks: tuple[int, ...]
    reward_range: tuple[float, float] = (0.0, 1.0)

    def success_rates(self, k: int = 1) -> list[float]:
        """Return pass@k of each problem."""
        return [pass_at_k(o.successes, len(o.rollouts), k) for o in self.outcomes]

    @property
    def replicates(self) -> int:
        return len(self.outcomes[0].rollouts)

    def pass_at(self, k: int) -> Estimate:
        return rate_interval(self.success_rates(k), self.replicates, k)

    def mean_at(self, k: int) -> Estimate:
        rewards = [[rollout.verdict.reward for rollout in outcome.rollouts] for outcome in self.outcomes]
        values, seen = [mean_at_k(each, k) for each in rewards], [reward for each in rewards for reward in each]
        return mean_interval(values, self.replicates, k, self.reward_range, (min(seen), max(seen)))

    def metrics(self) -> dict[str, float]:
        """Return every figure under its name in the metrics files, `pass@1` among them.

        Of a mix also each task's own figures, as `TASK/pass@1` and so on.
        """
        rollouts = [rollout for outcome in self.outcomes for rollout in outcome.rollouts]
        figures = self._figures() | {
            "completion_length_mean": mean([len(r.completion.token_ids) for r in rollouts]),
            "truncated_frac": mean([r.completion.is_truncated for r in rollouts]),
            "chance_pass@1": mean([outcome.chance for outcome in self.outcomes]),
            "tasks": float(len(self.outcomes)),
            "replicates": float(self.replicates),
        }
        of_tasks: dict[str, list[Outcome]] = {}
        for outcome in self.outcomes:
            if name := member_of(outcome.problem_id):
                of_tasks.setdefault(name, []).append(outcome)
        for name, outcomes in sorted(of_tasks.items()):
            own = replace(self, outcomes=tuple(outcomes))._figures() | {"tasks": float(len(outcomes))}
            figures |= {f"{name}/{key}": value for key, value in own.items() if math.isfinite(value)}
        return figures

    def _figures(self) -> dict[str, float]:
        rollouts = [rollout for outcome in self.outcomes for rollout in outcome.rollouts]
        figures: dict[str, float] = {}
        for k in self.ks:
            for name, estimate in ((f"pass@{k}", self.pass_at(k)), (f"mean@{k}", self.mean_at(k))):
                figures |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
        greedy = [outcome.greedy for outcome in self.outcomes if outcome.greedy is not None]
        if greedy:
            figures["greedy_accuracy"] = mean([rollout.verdict.success for rollout in greedy])
        return figures | {
            "success_rate_all": mean([r.verdict.success for r in rollouts]),
            "reward_mean_all": mean([r.verdict.reward for r in rollouts]),
            "format_rate": mean([r.verdict.parsed is not None for r in rollouts]),
        }

    def summary(self) -> str:
        """Return the main figures in one line: the first pass@k with its interval, the others, the mean reward."""
        first, *others = self.ks
        passes = [f"pass@{first} {self.pass_at(first)}", *(f"pass@{k} {self.pass_at(k).value:.3f}" for k in others)]
        return "  ".join([*passes, f"reward {self.metrics()['reward_mean_all']:.3f}"])

    def samples(self, count: int) -> dict[str, list[Any]]:
        """Return a table of completions: one per problem, spread over the problems."""
        stride = max(1, len(self.outcomes) // max(1, count))
        chosen = [outcome.rollouts[0] for outcome in self.outcomes[::stride][:count]]
        return {
            "prompt": [r.prompt.messages[-1]["content"] for r in chosen],
            "completion": [r.completion.text for r in chosen],
            "answer": [r.verdict.parsed for r in chosen],
            "success": [r.verdict.success for r in chosen],
            "reward": [r.verdict.reward for r in chosen],
            "tokens": [len(r.completion.token_ids) for r in chosen],
            "finish": [r.completion.finish_reason for r in chosen],
            "problem": [r.prompt.problem_id for r in chosen],
        }


def evaluation_sampling(config: Config) -> Sampling:
    """Return how evaluation completions are drawn: as in training where `eval` does not say."""
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty")
    own = {name: value for name in names if (value := getattr(config.eval, name)) is not None}
    return replace(training_sampling(config.generation), **own)


def evaluate(
    task: Task,
    policy: Policy,
    generator: Generator,
    config: Config,
    processes: Processes | None = None,
    *,
    before: Sequence[range] = (),
) -> Evaluation:
    """Evaluate the policy on the different problems of `eval.num_ids` seeds, without those of the seeds `before`.

    Processes share the work, and all return the whole.
    """
    problems, _ = contents.evaluation_problems(task, config, before)
    if processes is None:
        outcomes = _outcomes(task, policy, generator, config, problems)
    else:
        own = processes.own(problems)
        with processes.inside(weights(generator)):
            found = processes.agreed(lambda: _outcomes(task, policy, generator, config, own))
        drawn = priced(generator, [each.rollouts for each in found], evaluation_sampling(config), processes)
        found = [replace(each, rollouts=tuple(row)) for each, row in zip(found, drawn, strict=True)]
        outcomes = processes.together(found)
    return Evaluation(tuple(outcomes), config.eval.ks, task.reward_range)


def _outcomes(
    task: Task, policy: Policy, generator: Generator, config: Config, problems: Sequence[Problem]
) -> list[Outcome]:
    sampling = evaluation_sampling(config)

    def drawn(k: int, sampling: Sampling) -> list[list[Rollout]]:
        key, seed = ("eval",), config.seed if config.eval.seed is None else config.eval.seed
        return collect(task, policy, generator, problems, k=k, sampling=sampling, seed=seed, key=key, training=False)

    sampled = drawn(config.eval.replicates, sampling)
    greedy: Sequence[Rollout | None] = [None] * len(problems)
    if config.eval.greedy:
        likeliest = Sampling(sampling.max_new_tokens, 0.0, repetition_penalty=sampling.repetition_penalty)
        greedy = [row[0] for row in drawn(1, likeliest)]
    return [
        Outcome(problem.id, tuple(rollouts), best, task.chance(problem))
        for problem, rollouts, best in zip(problems, sampled, greedy, strict=True)
    ]


def write(path: Path, evaluation: Evaluation) -> None:
    """Write the k's and the range of rewards, then one JSON object per problem."""
    head = {"ks": evaluation.ks, "reward_range": evaluation.reward_range, "problems": len(evaluation.outcomes)}
    with replacing(path, synced=True) as stream:  # others may read it as soon as it is there
        stream.write(_line(head))
        for outcome in evaluation.outcomes:
            record = {
                "prompt": asdict(outcome.rollouts[0].prompt),
                "rollouts": [record_of(rollout) for rollout in outcome.rollouts],
                "greedy": record_of(outcome.greedy) if outcome.greedy else None,
                "chance": outcome.chance,
            }
            stream.write(_line(record))


def _line(record: object) -> bytes:
    return json.dumps(record).encode() + b"\n"


def read(path: Path) -> Evaluation:
    """Read what `write` wrote.

    Raises:
        UserError: the file is not whole.
    """
    try:
        first, *lines = (json.loads(line) for line in path.read_text().splitlines())
        if len(lines) != first.get("problems", len(lines)):  # earlier versions wrote none
            raise ValueError(f"it holds {len(lines)} of {first['problems']} problems")
        return _of_records(first, lines)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is no whole evaluation: {one_line(error)}") from error


def _of_records(head: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> Evaluation:
    outcomes = []
    for record in records:
        asked = record["prompt"]
        prompt = Prompt(asked["problem_id"], tuple(asked["messages"]), tuple(asked["token_ids"]))
        greedy = rollout_of(prompt, record["greedy"]) if record["greedy"] else None
        rollouts = tuple(rollout_of(prompt, item) for item in record["rollouts"])
        outcomes.append(Outcome(prompt.problem_id, rollouts, greedy, record["chance"]))
    reward_range = head.get("reward_range", (0.0, 1.0))  # earlier versions wrote none
    return Evaluation(tuple(outcomes), tuple(head["ks"]), tuple(reward_range))


def named(figures: Mapping[str, float]) -> dict[str, float]:
    """Return figures by the names that they have in MLflow, which takes no `@`."""
    return {f"eval/{name.replace('@', '_at_')}": value for name, value in figures.items()}


def track(tracker: Tracker, evaluation: Evaluation, version: int, seconds: float, samples: int) -> None:
    """Log an evaluation: metrics, its JSON file, a table of completions."""
    figures = evaluation.metrics()
    tracker.metrics({**named(figures), "perf/seconds_evaluate": seconds}, version)
    tracker.text(f"metrics/eval_{name_of(version)}.json", json.dumps({"iteration": version, **figures}, indent=1))
    if samples:
        tracker.table(f"samples/eval_{name_of(version)}.json", evaluation.samples(samples))
