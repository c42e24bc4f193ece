"""Dynamic sampling: flat groups give way to others within the rounds allowed, repeatably, and curves stay honest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from grpo_mlflow import runs
from grpo_mlflow.config import Resolved, resolve
from grpo_mlflow.errors import UserError
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.runtime.processes import Processes
from grpo_mlflow.training import rollout_files
from grpo_mlflow.training.sources import Collected, group_source
from tests.support.fake_server import SAMPLE, FakeServer, Fault
from tests.support.scripted import Numbered, Scripted
from tests.support.small_runs import SMALL, resume, same, small

P, K = 8, 4


def collect(policy: Policy, mixed: range, version: int = 0, *overrides: str) -> tuple[Collected, Scripted]:
    words = [f"data.problems_per_iteration={P}", f"data.rollouts_per_problem={K}", "data.train_seed_start=1000"]
    config = resolve("tiny", [*words, "data.num_train_seeds=64", *overrides]).config
    generator = Scripted(mixed)
    source = group_source(config, Numbered(), policy, lambda: generator, Processes(Accelerator(cpu=True)))
    return source.groups(version), generator


def test_off_it_samples_once(policy: Policy) -> None:
    collected, generator = collect(policy, range(1000, 1032))
    assert [len(numbers) for _, numbers in generator.asked] == [P]
    assert collected.groups == collected.first == collected.sampled
    assert "resampled_problems" not in collected.metrics()


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_where_all_are_flat_the_rounds_are_spent_and_the_first_stay(policy: Policy, rounds: int) -> None:
    collected, generator = collect(policy, range(0), 0, f"data.resample_rounds={rounds}")
    asked = [numbers for _, numbers in generator.asked]
    assert [len(numbers) for numbers in asked] == [P] * (1 + rounds)
    assert collected.groups == collected.first
    assert len(collected.sampled) == P * (1 + rounds)
    metrics = collected.metrics()
    assert (metrics["resampled_problems"], metrics["resampled_flat_frac"]) == (P * rounds, 1.0)
    assert metrics["flat_group_frac"] == metrics["flat_group_frac_trained"] == 1.0


def test_no_problem_comes_twice_and_all_are_training_problems(policy: Policy) -> None:
    collected, generator = collect(policy, range(0), 0, "data.resample_rounds=50")
    numbers = [number for _, numbers in generator.asked for number in numbers]
    assert sorted(numbers) == list(range(1000, 1064))  # then there are no more
    assert len(collected.groups) == P


def test_only_flat_groups_give_way_and_each_place_is_filled_once(policy: Policy) -> None:
    collected, generator = collect(policy, range(1000, 1032), 0, "data.resample_rounds=9")
    flat = [place for place, group in enumerate(collected.first) if group.is_flat]
    assert 0 < len(flat) < P
    assert not any(group.is_flat for group in collected.groups)
    for place, (before, after) in enumerate(zip(collected.first, collected.groups, strict=True)):
        assert (before == after) == (place not in flat)
    assert len({group.problem.id for group in collected.groups}) == P
    left = len(flat)  # each round asks for as many as are flat still
    for _, numbers in generator.asked[1:]:
        assert len(numbers) == left
        left -= sum(number in generator.mixed for number in numbers)
    assert left == 0


@pytest.mark.parametrize("version", range(4))
def test_with_rounds_no_fewer_groups_have_a_signal(policy: Policy, version: int) -> None:
    def flat(rounds: int) -> int:
        collected, _ = collect(policy, range(1000, 1016), version, f"data.resample_rounds={rounds}")
        return sum(group.is_flat for group in collected.groups)

    shares = [flat(rounds) for rounds in (0, 1, 2, 4)]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < shares[0]


def test_metrics_are_those_of_the_first_draw(policy: Policy) -> None:
    plain, _ = collect(policy, range(1000, 1032))
    more, _ = collect(policy, range(1000, 1032), 0, "data.resample_rounds=9")
    first, chosen = plain.metrics(), more.metrics()
    assert more.first == plain.first
    for name in ("reward_mean", "success_rate", "flat_group_frac", "completion_length_mean", "truncated_frac"):
        assert chosen[name] == first[name]
    assert chosen["flat_group_frac_trained"] == 0 < first["flat_group_frac"]
    assert chosen["advantage_std"] > first["advantage_std"]  # of what is trained on


def test_batch_scaling_takes_the_groups_that_are_trained_on(policy: Policy) -> None:
    # one right of four in each of the 8 groups: mean 1/4, sum of squares 32 * 3/16 = 6, std sqrt(6/31)
    collected, _ = collect(policy, range(1000, 1032), 0, "data.resample_rounds=9", "train.scale_rewards=batch")
    unit = 1 / ((6 / 31) ** 0.5 + 1e-4)
    for group in collected.groups:
        assert group.advantages == pytest.approx((0.75 * unit, -0.25 * unit, -0.25 * unit, -0.25 * unit))


def test_every_iteration_and_seed_draws_in_its_own_order(policy: Policy) -> None:
    def asked(version: int, *overrides: str) -> list[Any]:
        return collect(policy, range(0), version, "data.resample_rounds=2", *overrides)[1].asked

    assert asked(1) == asked(1)
    assert asked(1)[1][1] != asked(2)[1][1]
    assert asked(1)[1][1] != asked(1, "seed=5")[1][1]
    assert len({key for key, _ in asked(1) + asked(2)}) == 6  # no two draws share a stream


def test_every_training_problem_in_every_iteration_leaves_nothing_to_draw() -> None:
    words = ["data.num_train_seeds=64", "data.resample_rounds=1"]
    assert any("data.resample_rounds has no effect" in line for line in resolve("tiny", words).warnings)


ROUNDS = "data.resample_rounds=2"


def kept(finished: runs.Finished) -> dict[str, str]:
    """The groups of a run, iteration by iteration, as they were written."""
    return {path.name: path.read_text() for path in sorted((finished.run_dir / "rollouts").glob("iter_*.jsonl"))}


def sampled(finished: runs.Finished) -> list[tuple[str, list[tuple[int, ...]]]]:
    """The problems and the tokens of the first iteration; log-probs of other batches differ by rounding."""
    groups = rollout_files.read(finished.run_dir / "rollouts/iter_000.jsonl")
    return [(group.problem.id, [rollout.completion.token_ids for rollout in group.rollouts]) for group in groups]


def test_a_run_trains_on_more_groups_with_a_signal_and_resumes(store: str) -> None:
    whole = runs.train(small(store, ROUNDS))
    one_by_one = runs.train(small(store, ROUNDS, "generation.batch_size=1", "train.iterations=2"))
    assert sampled(one_by_one) == sampled(whole)
    found = [json.loads(path.read_text()) for path in sorted((whole.run_dir / "metrics").glob("train_iter_*.json"))]
    assert sum(each["resampled_problems"] for each in found) > 0
    assert all(each["flat_group_frac_trained"] <= each["flat_group_frac"] for each in found)
    assert any(each["flat_group_frac_trained"] < each["flat_group_frac"] for each in found)
    shares = [
        [group.is_flat for group in rollout_files.read(path)] for path in sorted(whole.run_dir.glob("rollouts/iter*"))
    ]
    assert [sum(flat) / len(flat) for flat in shares] == [each["flat_group_frac_trained"] for each in found]
    again = runs.train(small(store, ROUNDS))
    again = resume(store, str(again.run_dir / "checkpoints" / "iter_002"))
    same(whole, again, store)
    assert again.progress.tokens == whole.progress.tokens


def overlapping(server: FakeServer, store: str, *overrides: str) -> Resolved:
    words = ["generation.backend=vllm_server", f"generation.base_url={server.url}", f"tracking.uri={store}"]
    words += ["generation.async_rollouts=1", "checkpoint.keep_last=9", "eval.num_ids=4", ROUNDS]
    return resolve("tiny", [*SMALL, *words, *overrides])


def versions(run_dir: Path, iteration: int) -> set[int]:
    groups = rollout_files.read(run_dir / f"rollouts/iter_{iteration:03d}.jsonl")
    return {rollout.completion.policy_version for group in groups for rollout in group.rollouts}


def test_what_was_sampled_ahead_is_filled_up_by_the_present_version(small_model: Path, store: str) -> None:
    with FakeServer("vllm", small_model) as server:
        whole = runs.train(overlapping(server, store))
        before, found = kept(whole), [versions(whole.run_dir, iteration) for iteration in range(4)]
        assert all(seen <= {max(0, i - 1), i} for i, seen in enumerate(found))
        assert any(len(seen) == 2 for seen in found)
        again = resume(store, str(whole.run_dir / "checkpoints" / "iter_002"))
    assert kept(again) == before


def test_a_server_that_fails_while_filling_up_loses_nothing_that_was_sampled_ahead(
    small_model: Path, store: str
) -> None:
    settings = ("eval.enabled=false", "generation.retry_seconds=0")
    with FakeServer("vllm", small_model) as server:
        whole = runs.train(overlapping(server, store, *settings))
    assert 1 in versions(whole.run_dir, 1)  # the first that are asked for with the second weights fill iteration 1 up
    fault = Fault(SAMPLE["vllm"], lambda _server, _answer: (400, {"error": {"message": "no"}}), loads=2, nth=0)
    with FakeServer("vllm", small_model, [fault]) as server:
        with pytest.raises(UserError):
            runs.train(overlapping(server, store, *settings))
        experiment = Path(store.removeprefix("sqlite:///")).parent
        (stopped,) = set(experiment.rglob("checkpoints/iter_001")) - set(whole.run_dir.rglob("checkpoints/iter_001"))
        assert (stopped / "trainer/ahead.jsonl").is_file()
        assert not (stopped.parent / "iter_002").exists()
        again = resume(store, str(stopped))
    assert kept(again) == kept(whole)
