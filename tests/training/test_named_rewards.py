"""Rewards by name on their way through an iteration: groups, files, metrics, and judging while others are sampled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grpo_mlflow.errors import ConfigError, UserError
from grpo_mlflow.generation import Sampling
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.tasks import Overlong, Pending, Posed, Task
from grpo_mlflow.tasks.judged import Judged
from grpo_mlflow.training import rollout_files, rollout_metrics
from grpo_mlflow.training.rollouts import collect, form_groups
from grpo_mlflow.types import Completion, Problem, Prompt, Rollout, Verdict
from tests.support.rewarded import problem
from tests.support.scripted import Numbered

NONE = None
WEIGHTS = {"a": 1.0, "b": 2.0}


def verdict(a: float | None, b: float | None) -> Verdict:
    values = {"a": a, "b": b}
    parts = {name: WEIGHTS[name] * value for name, value in values.items() if value is not None}
    return Verdict(sum(parts.values()), parts, False, None, values, WEIGHTS)


def row(*verdicts: Verdict) -> list[Rollout]:
    prompt = Prompt("p", (), (1,))
    return [Rollout(prompt, Completion((1, 2), "", (0.0, 0.0), "stop", 0), each) for each in verdicts]


MIXED = row(verdict(0, 1), verdict(1, NONE), verdict(2, 1), verdict(3, NONE))
FLAT = row(verdict(1, NONE), verdict(1, 0.7), verdict(1, 0.7), verdict(NONE, NONE))
ALONE = row(*[verdict(NONE, NONE)] * 4)


def test_a_reward_that_does_not_apply_leaves_the_advantage_to_the_others() -> None:
    mixed, flat, alone = form_groups([problem()] * 3, [MIXED, FLAT, ALONE], "none")
    assert mixed.advantages == (-1.5, -0.5, 0.5, 1.5)
    assert flat.advantages == alone.advantages == (0.0,) * 4
    assert [mixed.is_flat, flat.is_flat, alone.is_flat] == [False, True, True]


def test_normalised_first_by_the_weights_of_the_verdicts() -> None:
    (mixed,) = form_groups([problem()], [MIXED], "group", "normalize_then_sum")
    assert mixed.advantages == pytest.approx((-1.16178, -0.38726, 0.38726, 1.16178), abs=1e-5)  # TRL 1.16.0
    equal_sums = row(verdict(1, 0), verdict(0, 0.5), verdict(0.5, 0.25), verdict(0, 0.5))
    summed, first = (form_groups([problem()], [equal_sums], "group", how)[0] for how in _BOTH)
    assert summed.is_flat
    assert not first.is_flat


def test_a_reward_below_zero_that_the_mean_would_divide_is_refused_with_its_problem() -> None:
    (scaled,) = form_groups([problem()], [MIXED], "mean")  # sums 2, 3, 4, 5
    assert scaled.advantages == pytest.approx((-1.5 / 3.5, -0.5 / 3.5, 0.5 / 3.5, 1.5 / 3.5))
    below = row(verdict(0, 1), verdict(-1, 0.25), verdict(NONE, NONE))
    with pytest.raises(ConfigError) as caught:
        form_groups([problem(), replace(problem(), id="below")], [MIXED[:3], below], "mean")
    for part in ("train.scale_rewards = 'mean': a completion of below has the reward -0.5,", "; allowed: "):
        assert part in str(caught.value)


_BOTH: tuple[Any, ...] = ("sum_then_normalize", "normalize_then_sum")


def test_they_are_kept_and_read_as_they_were(tmp_path: Path) -> None:
    groups = form_groups(
        [problem("a"), problem("b")], [MIXED, row(*[Verdict(1.0, {"a": 1.0}, True, "1")] * 4)], "group"
    )
    rollout_files.write(tmp_path / "x", groups)
    found = rollout_files.read(tmp_path / "x")
    for read, written in zip(found, groups, strict=True):
        assert [rollout.verdict for rollout in read.rollouts] == [rollout.verdict for rollout in written.rollouts]
        assert read.advantages == written.advantages
    assert b'"values"' not in (tmp_path / "x").read_bytes().splitlines()[1]


def test_each_is_logged_over_those_that_it_applies_to() -> None:
    found = rollout_metrics.metrics(form_groups([problem()] * 2, [MIXED, ALONE], "group"))
    assert found["reward_mean"] == (2 + 1 + 4 + 3) / 4  # those that none applies to have no reward
    assert (found["reward_a"], found["reward_b"]) == (1.5, 2.0)  # weight times value
    assert found["reward_a_std"] == pytest.approx(1.25**0.5)
    assert found["reward_b_std"] == 0.0
    assert (found["reward_a_at_lowest"], found["reward_a_at_highest"]) == (0.25, 0.25)
    assert (found["reward_b_at_lowest"], found["reward_b_at_highest"]) == (1.0, 1.0)
    assert (found["reward_a_applies"], found["reward_b_applies"]) == (0.5, 0.25)
    none = rollout_metrics.metrics(form_groups([problem()], [ALONE], "group"))
    assert (none["reward_mean"], none["reward_a_applies"]) == (0.0, 0.0)
    assert "reward_a" not in none


def test_training_has_weights_of_its_own_and_pays_for_length() -> None:
    posed = Posed(Numbered(), None, Overlong(4, 4), {"b": 10.0, "of another task": 1.0})
    found = posed.trained(verdict(1, 0.5), Completion((1, 2), "", (0.0, 0.0), "stop", 0))
    assert found.parts == {"a": 1.0, "b": 5.0, "overlong": -0.5}
    assert found.reward == 5.5
    assert (found.values, found.weights) == (
        {"a": 1, "b": 0.5, "overlong": -0.5},
        {"a": 1.0, "b": 10.0, "overlong": 1.0},
    )
    plain = Verdict(1.0, {"b": 1.0}, True, "1")
    assert Posed(Numbered(), None, None, {"b": 10.0}).trained(plain, found) is plain  # type: ignore[arg-type]


class InParts:
    """Gives the completions of two prompts at a time, and notes when."""

    def __init__(self, events: list[str]) -> None:
        self._events = events

    def generate(self, *_: object) -> list[list[Completion]]:
        raise AssertionError("it is asked for parts")

    def stream(
        self, prompts: Sequence[Prompt], k: int, sampling: Sampling, seed: int, key: tuple[str | int, ...]
    ) -> Iterator[list[list[Completion]]]:
        for start in range(0, len(prompts), 2):
            self._events.append(f"sampled {start}")
            texts = [[f"{prompt.problem_id} {j}" for j in range(k)] for prompt in prompts[start : start + 2]]
            yield [[Completion((1, 2), text, (0.0, 0.0), "stop", 0) for text in each] for each in texts]

    def sync(self, version: int) -> None: ...

    def metrics(self) -> dict[str, float]:
        return {}


class InBackground(Numbered):
    """Notes when it begins to judge, and when it is waited for."""

    def __init__(self, events: list[str]) -> None:
        self._events = events

    def begin(self, problems: Sequence[Problem], completions: Sequence[Completion]) -> Pending:
        self._events.append(f"begun {len(completions)}")

        def wait() -> list[Verdict]:
            self._events.append("waited")
            return [Verdict(float(each.text.endswith("0")), {}, False, each.text) for each in completions]

        return wait


def test_a_part_is_judged_while_the_next_is_sampled(policy: Policy) -> None:
    events: list[str] = []
    task = InBackground(events)
    problems = [task.problem("train", n) for n in range(5)]
    found = collect(task, policy, InParts(events), problems, k=3, sampling=Sampling(4), seed=0, key=("train", 0))
    assert events == [
        *("sampled 0", "begun 6", "sampled 2", "begun 6", "sampled 4", "begun 3"),
        *("waited", "waited", "waited"),
    ]
    assert [[rollout.verdict.parsed for rollout in row] for row in found] == [
        [f"numbered/{n} {j}" for j in range(3)] for n in range(5)
    ]


class Tells(InParts):
    """Tells the completions of each prompt in the order of `told`, and those of prompt 1 wrongly at first."""

    def __init__(self, events: list[str], told: Sequence[int]) -> None:
        super().__init__(events)
        self._told = told

    stream = None  # type: ignore[assignment]

    def tell(self, prompts: Sequence[Prompt], k: int, *asked: object, drawn: Any) -> list[list[Completion]]:
        for place in self._told:
            self._events.append(f"told {place}")
            drawn(place, [((1, 2), f"{prompts[place].problem_id} {j}{'?' * (place == 1)}") for j in range(k)])
        texts = [[f"{prompt.problem_id} {j}" for j in range(k)] for prompt in prompts]
        return [[Completion((1, 2), text, (0.0, 0.0), "stop", 0) for text in each] for each in texts]


def test_what_a_server_tells_is_judged_while_it_samples_others_and_again_if_it_was_drawn_again(policy: Policy) -> None:
    events: list[str] = []
    task = InBackground(events)
    problems = [task.problem("train", n) for n in range(3)]
    generator = Tells(events, [2, 1])
    found = collect(task, policy, generator, problems, k=2, sampling=Sampling(4), seed=0, key=("train", 0))
    # neither what was drawn again nor what was not told was judged before
    assert events == ["told 2", "begun 2", "told 1", "begun 2", "begun 2", "begun 2", *["waited"] * 3]
    assert [[rollout.verdict.parsed for rollout in row] for row in found] == [
        [f"numbered/{n} {j}" for j in range(2)] for n in range(3)
    ]


class Batched(Numbered):
    """Judges in batches, as `gives` says."""

    def __init__(self, gives: Any = None) -> None:
        self.gives, self.batches = gives, list[int]()

    def verify_batch(self, problems: Sequence[Problem], texts: Sequence[str]) -> Any:
        self.batches.append(len(texts))
        if isinstance(self.gives, BaseException):
            raise self.gives
        return [self.verify(*each) for each in zip(problems, texts, strict=True)] if self.gives is None else self.gives


class Waiting(Batched):
    async def verify_batch(self, problems: Sequence[Problem], texts: Sequence[str]) -> Any:
        return super().verify_batch(problems, texts)


COMPLETIONS = [Completion((1,), text, (0.0,), "stop", 0) for text in ("right", "wrong")]


@pytest.mark.parametrize("kind", [Batched, Waiting])
def test_a_task_may_judge_in_batches(kind: type[Batched], tmp_path: Path) -> None:
    task = kind()
    problems = [task.problem("train", n) for n in range(2)]
    for each in (Judged(task, "mine", tmp_path), task):
        assert [found.reward for found in each.begin(problems, COMPLETIONS)()] == [1.0, 0.0]
    assert task.batches == [2, 2]


GOOD = Verdict(1.0, {}, True, None)


@pytest.mark.parametrize("kind", [Batched, Waiting])
@pytest.mark.parametrize(
    ("gives", "told"),
    [
        (KeyError("lost"), "of a batch of 2, which begins with problem 'numbered/0' (seed 0) raised KeyError: 'lost'"),
        (SystemExit(3), "raised SystemExit: 3"),
        ([GOOD], "gave 1 verdicts; allowed: one for each"),
        ([GOOD, None], "of problem 'numbered/1' (seed 1) gave None; allowed: a Verdict"),
        (3, "raised TypeError"),
    ],
)
def test_a_batch_that_cannot_be_judged_is_one_line(kind: type[Batched], gives: Any, told: str, tmp_path: Path) -> None:
    task = kind(gives)
    problems = [task.problem("train", n) for n in range(2)]
    with pytest.raises(UserError) as caught:
        Judged(task, "mine", tmp_path).begin(problems, COMPLETIONS)()
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert Path(str(caught.value).rpartition(" in ")[2]).is_file()


def test_a_task_without_batches_is_asked_one_by_one(tmp_path: Path) -> None:
    task: Task = Judged(Numbered(), "mine", tmp_path)
    problems = [task.problem("train", n) for n in range(2)]
    assert [found.success for found in task.begin(problems, COMPLETIONS)()] == [True, False]
