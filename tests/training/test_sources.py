"""Where groups come from: what each source calls, in which order, and what outlives a failure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from accelerate import Accelerator

from grpo_mlflow import runs
from grpo_mlflow.config import resolve
from grpo_mlflow.errors import ServerFailed, UserError
from grpo_mlflow.generation import Generator
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.runtime.processes import Processes
from grpo_mlflow.tasks import Pending, Task
from grpo_mlflow.training import rollout_files
from grpo_mlflow.training.checkpoint import Checkpoint
from grpo_mlflow.training.sources import GroupSource, group_source, read_ahead
from grpo_mlflow.training.sources.ahead import Ahead
from grpo_mlflow.types import Completion, Problem
from tests.support.groups import make_groups
from tests.support.scripted import Background, Numbered
from tests.support.small_runs import same, small

P, K, ITERATIONS = 4, 4, 3
AHEAD = ("generation.backend=vllm_server", "generation.base_url=http://127.0.0.1:9", "generation.async_rollouts=1")
ROUND = "data.resample_rounds=1"


class Watched(Numbered):
    """Notes as of which iteration it judges, and fails from one on."""

    def __init__(self) -> None:
        self.iteration, self.judged, self.fails_from = 0, list[int](), ITERATIONS

    def at(self, iteration: int, iterations: int) -> None:
        self.iteration = iteration

    def begin(self, problems: Sequence[Problem], completions: Sequence[Completion]) -> Pending:
        self.judged.append(self.iteration)
        if self.iteration >= self.fails_from:
            raise UserError("no verdict")
        return super().begin(problems, completions)


def source_of(
    policy: Policy, generator: Generator, *overrides: str, ahead: Ahead | None = None, task: Task | None = None
) -> GroupSource:
    words = [
        f"data.problems_per_iteration={P}",
        f"data.rollouts_per_problem={K}",
        f"train.iterations={ITERATIONS}",
        "train.lr_warmup_steps=0",
    ]
    config = resolve("tiny", [*words, "data.train_seed_start=1000", "data.num_train_seeds=64", *overrides]).config
    processes = Processes(Accelerator(cpu=True))
    return group_source(config, task or Numbered(), policy, lambda: generator, processes, ahead=ahead)


def iterate(source: GroupSource, version: int) -> list[str]:
    """Take the groups of an iteration as the trainer does; return the ids of their problems."""
    groups = source.groups(version).groups
    source.begin(version + 1)
    return [group.problem.id for group in groups]


def test_what_is_sampled_ahead_has_ended_before_the_weights_change(policy: Policy) -> None:
    generator = Background(range(0))
    source = source_of(policy, generator, *AHEAD)
    found = [iterate(source, version) for version in range(ITERATIONS)]
    assert generator.events == [
        *[("sync", 0), ("generate", "train", 0), ("begin", "train", 1)],
        *[("result",), ("sync", 1), ("begin", "train", 2)],
        *[("result",), ("sync", 2)],  # there is no iteration 3
    ]
    plain = source_of(policy, Background(range(0)))
    assert found == [iterate(plain, version) for version in range(ITERATIONS)]


def test_what_is_sampled_ahead_is_judged_once_and_as_of_its_own_iteration(policy: Policy) -> None:
    task = Watched()
    source = source_of(policy, Background(range(0)), *AHEAD, task=task)
    iterate(source, 0)
    source.settle()  # before a checkpoint, while the task knows of iteration 0 alone
    assert task.judged == [0, 1]
    iterate(source, 1)
    task.fails_from = 2
    with pytest.raises(UserError, match="no verdict"):
        source.groups(2)
    source.stop()
    assert task.judged == [0, 1, 2]


def test_flat_groups_are_replaced_before_the_next_iteration_begins(policy: Policy) -> None:
    generator = Background(range(0))
    source = source_of(policy, generator, *AHEAD, ROUND)
    iterate(source, 0)
    iterate(source, 1)
    assert generator.events[-4:] == [
        *[("result",), ("sync", 1), ("generate", "train", 1, "resample", 0), ("begin", "train", 2)],
    ]


def test_what_was_sampled_ahead_outlives_a_server_that_fails(policy: Policy, tmp_path: Path) -> None:
    generator, path = Background(range(0)), tmp_path / "trainer" / "ahead.jsonl"
    source = source_of(policy, generator, *AHEAD, ROUND)
    iterate(source, 0)
    generator.fails = ("train", 1, "resample", 0)
    with pytest.raises(ServerFailed):
        source.groups(1)
    source.stop()
    source.save(path, 1)
    kept = rollout_files.read(path)
    asked = [numbers for key, numbers in generator.asked if key == ("train", 1)]
    assert [[group.problem.seed for group in kept]] == asked

    found = read_ahead(Checkpoint(tmp_path, 1, None))
    assert found == Ahead(1, kept)
    resumed = Background(range(0))
    source = source_of(policy, resumed, *AHEAD, ROUND, ahead=found)
    assert source.groups(1).first == kept
    assert resumed.events == [("sync", 1), ("generate", "train", 1, "resample", 0)]


@pytest.mark.parametrize("done", [True, False])
def test_a_stop_keeps_all_that_is_there_and_waits_for_nothing(policy: Policy, tmp_path: Path, done: bool) -> None:
    generator = Background(range(0), done)
    source = source_of(policy, generator, *AHEAD)
    iterate(source, 0)
    source.stop()
    assert generator.events[-1] == (("result",) if done else ("cancel",))
    source.save(tmp_path / "ahead.jsonl", 1)
    assert (tmp_path / "ahead.jsonl").exists() == done


def test_groups_in_use_are_not_saved_as_those_of_the_next_iteration(policy: Policy, tmp_path: Path) -> None:
    source = source_of(policy, Background(range(0), done=False), *AHEAD)
    for version in range(ITERATIONS):
        iterate(source, version)
    source.save(tmp_path / "ahead.jsonl", ITERATIONS)
    assert not (tmp_path / "ahead.jsonl").exists()


def test_groups_in_use_are_saved_for_their_own_iteration_until_its_update_is_done(
    policy: Policy, tmp_path: Path
) -> None:
    source, path = source_of(policy, Background(range(0)), *AHEAD), tmp_path / "ahead.jsonl"
    iterate(source, 0)
    in_use = source.groups(1).groups
    source.begin(2)
    source.stop()  # that of iteration 2 is all there
    source.save(path, 1)
    assert rollout_files.read(path) == in_use
    source.save(path, 2)
    assert [group.problem.seed for group in rollout_files.read(path)] != [group.problem.seed for group in in_use]


def test_a_recording_makes_no_generator(policy: Policy) -> None:
    def refuse() -> Generator:
        raise AssertionError("a recording samples nothing")

    groups = make_groups(P)
    source = group_source(
        resolve("tiny", []).config,
        Numbered(),
        policy,
        refuse,
        Processes(Accelerator(cpu=True)),
        recording=lambda iteration: groups[iteration:],
    )
    assert source.groups(2).groups == groups[2:]
    assert source.metrics() == {}


def test_a_run_on_recorded_groups_without_evaluations_starts_no_server(store: str) -> None:
    live = runs.train(small(store, "eval.enabled=false"))
    words = ["generation.backend=vllm_server", "generation.server.manage=true", "generation.server.python=/bin/false"]
    again = runs.train(small(store, f"data.source=runs:/{live.run_id}", "eval.enabled=false", *words))
    same(live, again, store)
