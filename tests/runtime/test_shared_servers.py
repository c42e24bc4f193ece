"""Several processes that train with servers: the first one asks them for all, and the run is that of one process."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import mlflow
import pytest

from grpo_mlflow import runs
from grpo_mlflow.config import resolve
from tests.support import ranks
from tests.support.fake_server import SAMPLE, Answer, Dropped, FakeServer, Fault, Quirks
from tests.support.small_runs import SMALL, equal, newest, resume

SAMPLING = ("generation.backend=vllm_server", "generation.batch_size=2", "eval.num_ids=5", "eval.greedy=false")


@pytest.fixture
def store(shared_store: str, small_model: Path) -> str:
    return shared_store


def at(*servers: FakeServer) -> str:
    return f"generation.base_url=[{','.join(server.url for server in servers)}]"


def words(store: str, *overrides: str) -> tuple[str, ...]:
    return (*SMALL, *SAMPLING, f"tracking.uri={store}", *overrides)


def alone(store: str, folder: Path, *overrides: str) -> str:
    with FakeServer("vllm", folder) as server:
        return runs.train(resolve("tiny", [*words(store, *overrides), at(server)])).run_id


def _dies_and_comes_back(server: FakeServer, answer: Answer) -> Answer:
    server.away(1.0)
    raise Dropped


@pytest.mark.parametrize(
    "more",
    [
        "",
        "generation.async_rollouts=1",
        "generation.behaviour_logprobs=recompute",
        "generation.behaviour_logprobs=recompute train.sharding=full",
    ],
)
def test_two_processes_with_two_servers_train_like_one_with_one(
    store: str, small_model: Path, tmp_path: Path, more: str
) -> None:
    """Also where one server is killed in mid-run and comes back with the weights of the start."""
    settings = ("data.resample_rounds=1", *more.split())
    one = alone(store, small_model, *settings)
    fault = Fault(SAMPLE["vllm"], _dies_and_comes_back, loads=2, nth=1)
    with FakeServer("vllm", small_model, [fault]) as first, FakeServer("vllm", small_model) as second:
        started = ranks.start(ranks.train, words(store, at(first, second), *settings), tmp_path)
        assert started.end() == [0, 0], started.everything()
        assert fault.met > fault.nth
        assert min(server.requests[SAMPLE["vllm"]] for server in (first, second)) > 10
    assert started.text(1) == ""
    equal(store, one, newest(store))


@pytest.mark.slow
def test_three_processes_of_which_one_has_nothing_to_ask(store: str, small_model: Path, tmp_path: Path) -> None:
    """It waits for the others, and tells how far it is meanwhile."""
    seconds = 16.0  # after which a process tells for the first time

    def slowly(server: FakeServer, answer: Answer) -> Answer:
        time.sleep(seconds)
        return answer

    fault = Fault(SAMPLE["vllm"], slowly, loads=1, nth=1)
    sizes = ("eval.num_ids=2", "data.problems_per_iteration=3", "train.iterations=1", "train.batch_size=4")
    with FakeServer("vllm", small_model, [fault]) as server:
        started = ranks.start(ranks.train, words(store, at(server), *sizes), tmp_path, 3)
        assert started.end(120) == [0, 0, 0], started.everything()
    assert fault.met >= fault.nth


def test_two_processes_measure_a_model_with_servers_like_one(store: str, small_model: Path, tmp_path: Path) -> None:
    with FakeServer("vllm", small_model) as first, FakeServer("vllm", small_model) as second:
        whole = runs.evaluate(resolve("tiny", words(store, at(first))), "")
        started = ranks.start(ranks.evaluate, words(store, at(first, second)), tmp_path)
        assert started.end() == [0, 0], started.everything()
    assert whole.summary() in started.text(0)


def test_what_is_wrong_with_a_server_is_one_line_of_all(store: str, small_model: Path, tmp_path: Path) -> None:
    with (
        FakeServer("vllm", small_model) as right,
        FakeServer("vllm", small_model, quirks=Quirks(other_tokenizer=True)) as wrong,
    ):
        started = ranks.start(ranks.train, words(store, at(right, wrong)), tmp_path)
        assert started.end() == [1, 1], started.everything()
    (line,) = started.errors()
    assert f"the tokenizer of the server at {wrong.url} differs" in line
    assert "Traceback" not in started.everything()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_ends_all_while_they_wait_for_a_server(
    store: str, small_model: Path, tmp_path: Path, rank: int
) -> None:
    waiting: list[float] = []

    def hangs(server: FakeServer, answer: Answer) -> Answer:
        waiting.append(time.monotonic())
        time.sleep(60)
        return answer

    with FakeServer("vllm", small_model, [Fault(SAMPLE["vllm"], hangs, loads=3)]) as server:
        started = ranks.start(ranks.train, words(store, at(server), "eval.enabled=false"), tmp_path)
        while not waiting:
            assert started.processes[0].is_alive(), started.everything()
            time.sleep(0.02)
        os.kill(started.processes[rank].pid or 0, signal.SIGTERM)
        assert started.end(30) == [143, 143], started.everything()
    run = newest(store)
    tags = mlflow.MlflowClient(store).get_run(run).data.tags
    assert (tags["grpo.ended"], tags["grpo.last_checkpoint"]) == ("KILLED", "iter_002")
    with FakeServer("vllm", small_model) as server:
        resume(store, run, f"generation.base_url={server.url}")


def test_without_any_server_the_run_ends_with_one_line_and_can_go_on(
    store: str, small_model: Path, tmp_path: Path
) -> None:
    def leaves(server: FakeServer, answer: Answer) -> Answer:
        server.away(600)
        raise Dropped

    with FakeServer("vllm", small_model, [Fault(SAMPLE["vllm"], leaves, loads=2)]) as server:
        words_ = words(store, at(server), "generation.retry_seconds=1", "eval.enabled=false")
        started = ranks.start(ranks.train, words_, tmp_path)
        assert started.end() == [1, 1], started.everything()
    (line,) = started.errors()
    assert f"the server at {server.url}: sampling failed for 1 s" in line
    assert "iter_001" in started.text(0)
