"""Several servers as one: the same rollouts whoever draws them, and none holds the others up."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from grpo_mlflow import runs
from grpo_mlflow.config import resolve
from grpo_mlflow.errors import ConfigError, ServerAway, ServerUnfit
from grpo_mlflow.generation import Sampling
from grpo_mlflow.generation.server import batches
from grpo_mlflow.generation.server.engine import Ask, Draw
from grpo_mlflow.generation.server.replicas import gpus
from grpo_mlflow.generation.server.seats import Seat, choose
from tests.support.fake_server import LOAD, SAMPLE, Answer, Dropped, FakeServer, Fault
from tests.support.small_runs import SMALL
from tests.support.waiting import wait_for

AWAY, BACK = "is away: the run goes on with the others", "is back, with the newest weights"  # what a run tells
ROUND = 0.05  # seconds that a scripted server takes for a prompt
ASKS = [Ask((number,), 1, Sampling(4), 0, ()) for number in range(64)]


class Scripted:
    """A server that takes so long for a prompt; it fails while `away`, and says that it lost its weights so often."""

    def __init__(self, url: str, seconds: float = ROUND, losses: int = 0) -> None:
        self.url, self.seconds, self._losses = url, seconds, losses
        self.pace, self.redraws, self.loads, self.retried = 1.0, 0, 0, 0
        self.patient, self.failing, self.away = True, False, False
        self.patience, self.given_up = 2.0, 0
        self.asked: list[int] = []
        self.most = self._now = 0

    async def draw(self, ask: Ask) -> list[Draw]:
        self.asked.append(ask.token_ids[0])
        self._now += 1
        self.most = max(self.most, self._now)
        try:
            await self._answering()
            await asyncio.sleep(self.seconds)
            await self._answering()
        finally:
            self._now -= 1
        return [Draw((ask.token_ids[0],), None, "stop")]

    async def _answering(self) -> None:
        began = time.monotonic()
        while self.away:
            self.failing = True
            self.retried += 1
            if time.monotonic() - began > self.patience:
                self.given_up += 1
                raise ServerAway(f"{self.url}: no answer")
            await asyncio.sleep(0.01)
        self.failing = False

    async def still_proven(self, loads: int) -> bool:
        await self._answering()
        self._losses -= 1
        return self._losses < 0

    async def recover(self) -> None:
        await self._answering()


def sample(servers: list[Scripted], asks: list[Ask] = ASKS, at_once: int = 4) -> float:
    """Draw a batch, which must be whole and in order; return the seconds that it took."""
    for server in servers:
        server.asked.clear()
    began = time.monotonic()
    found = asyncio.run(batches.sample(servers, asks, at_once))
    assert [draws[0].token_ids[0] for draws in found] == [ask.token_ids[0] for ask in asks]
    return time.monotonic() - began


def test_each_server_has_so_many_prompts_in_flight_and_an_equal_share() -> None:
    servers = [Scripted(f"{n}") for n in range(4)]
    sample(servers)
    assert [server.most for server in servers] == [4] * 4
    assert sorted(place for server in servers for place in server.asked) == list(range(64))
    assert all(12 <= len(server.asked) <= 20 for server in servers)


def test_few_prompts_are_spread_over_all_servers() -> None:
    servers = [Scripted(f"{n}") for n in range(4)]
    sample(servers, ASKS[:8], at_once=8)
    assert [len(server.asked) for server in servers] == [2] * 4


@pytest.mark.parametrize("at_once", [2, 4, 16])
def test_a_slow_server_does_not_hold_a_batch_up(at_once: int) -> None:
    """Counted in prompts: what the fast ones draw in as many rounds, the slow one cannot draw in time."""
    fast, slow = [Scripted(f"{n}") for n in range(3)], Scripted("slow", 10 * ROUND)
    sample([slow, *fast], at_once=at_once)  # nobody knows yet that it is slow
    assert slow.pace > 2
    sample([slow, *fast], at_once=at_once)
    drawn = sum(len(server.asked) for server in fast)
    assert drawn + len(slow.asked) <= 64 + at_once  # hardly a prompt is drawn twice
    assert len(slow.asked) <= at_once
    assert max(len(server.asked) for server in fast) <= -(-64 // 3) + at_once


@pytest.mark.parametrize(("waiting", "taken"), [(24, 0), (48, 0), (240, 8)])
def test_a_slow_server_takes_a_prompt_only_where_nobody_will_wait_for_it(waiting: int, taken: int) -> None:
    """Three quick servers hold 24 prompts in a round, and it needs 2.7 rounds; no pace is measured exactly."""
    servers = [Scripted(f"{n}") for n in range(4)]
    for server, pace in zip(servers, (2.7, 1.0, 1.01, 1.02), strict=True):
        server.pace = pace

    async def hand_out() -> list[int]:
        held, left = [Seat(server, lambda: None) for server in servers], waiting
        while (seat := choose(held, left, 8)) is not None and left:
            left -= 1
            seat.draw(left, ASKS[0])
        found = [seat.busy for seat in held]
        for seat in held:
            await seat.leave()
        return found

    assert asyncio.run(hand_out()) == [taken, 8, 8, 8]


def test_a_slow_server_is_tried_again_and_gets_its_share_when_it_is_fast() -> None:
    servers = [Scripted("slow", 10 * ROUND), Scripted("1"), Scripted("2")]
    sample(servers)
    servers[0].seconds = ROUND
    for _ in range(20):
        sample(servers, ASKS[:24], at_once=2)
        if servers[0].pace < 1.5:
            break
    sample(servers)
    assert len(servers[0].asked) > 12


def test_a_server_that_is_away_holds_nothing_up_and_comes_back() -> None:
    servers = [Scripted("away"), Scripted("1")]
    servers[0].away = True
    threading.Timer(6 * ROUND, lambda: setattr(servers[0], "away", False)).start()
    sample(servers)
    assert len(servers[1].asked) > 32
    assert len(servers[0].asked) > 4  # those of the start, and more since it is back
    sample(servers)
    assert len(servers[0].asked) > 20


def test_without_any_server_a_batch_fails() -> None:
    servers = [Scripted("0"), Scripted("1")]
    for server in servers:
        server.away = True
    with pytest.raises(ServerAway, match="no answer"):
        sample(servers)


def test_a_short_failure_of_one_server_while_another_is_dead_ends_nothing() -> None:
    """The dead one gives up while the other fails, and has not given up: it comes back."""
    dead, short = Scripted("dead"), Scripted("short")
    dead.away = short.away = True
    dead.patience, short.patience = 0.2, 60.0

    def come_back() -> None:
        wait_for(lambda: dead.given_up)
        short.away = False

    threading.Thread(target=come_back, daemon=True).start()
    sample([dead, short], ASKS[:16])
    assert dead.given_up
    assert len(short.asked) >= 16


def test_only_what_a_server_drew_without_its_weights_is_drawn_again() -> None:
    servers = [Scripted("0", losses=1), Scripted("1")]
    sample(servers)
    assert [server.redraws for server in servers] == [1, 0]
    assert 64 < sum(len(server.asked) for server in servers) <= 64 + len(servers[0].asked)
    assert len(set(servers[1].asked)) == len(servers[1].asked)


# Over HTTP


@contextmanager
def fakes(folder: Path, count: int, **faults: list[Fault]) -> Iterator[list[FakeServer]]:
    with ExitStack() as held:
        yield [held.enter_context(FakeServer("vllm", folder, faults.get(f"of_{n}", []))) for n in range(count)]


def train(servers: list[FakeServer], store: str, *overrides: str) -> list[dict[str, Any]]:
    """Train, and return the metrics of each iteration."""
    words = ["generation.backend=vllm_server", f"generation.base_url=[{','.join(s.url for s in servers)}]"]
    words += [f"tracking.uri={store}", "eval.interval=4", "eval.num_ids=4", "generation.batch_size=2"]
    finished = runs.train(resolve("tiny", [*SMALL, *words, *overrides]))
    return [json.loads(path.read_text()) for path in sorted((finished.run_dir / "metrics").glob("train_iter_*.json"))]


def numbers(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = ("reward_mean", "loss_total", "grad_norm", "sampler_ratio_mean", "completion_length_mean")
    return [{name: each[name] for name in names} for each in metrics]


@pytest.fixture(scope="module")
def undisturbed(small_model: Path, shared_store: str) -> list[dict[str, Any]]:
    """What a run has from one server that never fails."""
    with fakes(small_model, 1) as servers:
        return numbers(train(servers, shared_store))


def told(caplog: pytest.LogCaptureFixture, line: str) -> int:
    """Return how often a line with these words was logged."""
    return sum(line in record.getMessage() for record in caplog.records)


def busy(server: FakeServer, answer: Answer) -> Answer:
    return 503, {"detail": "busy"}


def leaves(caplog: pytest.LogCaptureFixture, raw: bool = False) -> Callable[[FakeServer, Answer], Answer]:
    """Return what lets a server die that comes back when the run has gone on; `raw`: with other log-probabilities."""

    def gone(server: FakeServer, answer: Answer) -> Answer:
        before = told(caplog, AWAY)

        def be_away() -> None:
            server.stop_listening()
            wait_for(lambda: told(caplog, AWAY) > before)
            server.quirks.raw_logprobs = raw
            server.restart()
            server._listen()

        threading.Thread(target=be_away, daemon=True).start()
        raise Dropped

    return gone


def waits(caplog: pytest.LogCaptureFixture, line: str, loads: int) -> Fault:
    """In the batch after so many loads, the other server waits until the run has told this of the first one."""

    def waited(server: FakeServer, answer: Answer) -> Answer:
        wait_for(lambda: told(caplog, line))
        return answer

    return Fault(SAMPLE["vllm"], waited, loads=loads, nth=0)


def test_a_server_that_is_killed_and_comes_back_changes_no_number(
    small_model: Path, shared_store: str, undisturbed: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    """It is away when new weights come, so that it gets them later than the others."""
    dies = Fault(SAMPLE["vllm"], leaves(caplog), nth=0)  # a slower server may be asked only once in a batch
    with fakes(small_model, 2, of_0=[dies], of_1=[waits(caplog, BACK, 3)]) as servers:
        metrics = train(servers, shared_store)
        assert servers[0].faults[0].met > 1
        assert min(server.requests[SAMPLE["vllm"]] for server in servers) > 10
        assert servers[0].loads[-1] == servers[1].loads[-1]
    assert numbers(metrics) == undisturbed
    assert sum(each["server_retries"] for each in metrics) > 0
    assert told(caplog, BACK)


def unpriced(caplog: pytest.LogCaptureFixture, raw: bool = False) -> dict[str, list[Fault]]:
    """A request fails in a batch, so prices are checked after the next load; then the server dies, and comes back."""
    path = SAMPLE["vllm"]
    return {
        "of_0": [Fault(path, busy, loads=2, nth=0), Fault(path, leaves(caplog, raw), loads=3, nth=0)],
        "of_1": [waits(caplog, "asking again", 2), waits(caplog, BACK, 3)],
    }


def test_a_server_that_is_away_when_its_prices_are_checked_holds_nothing_up(
    small_model: Path, shared_store: str, undisturbed: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    with fakes(small_model, 2, **unpriced(caplog)) as servers:
        assert numbers(train(servers, shared_store)) == undisturbed
        assert all(fault.met > fault.nth for fault in servers[0].faults)
        assert servers[0].loads[-1] == servers[1].loads[-1]
    assert (told(caplog, AWAY), told(caplog, BACK)) == (1, 1)


def test_prices_that_could_not_be_checked_are_checked_after_the_next_load(
    small_model: Path, shared_store: str, caplog: pytest.LogCaptureFixture
) -> None:
    with fakes(small_model, 2, **unpriced(caplog, raw=True)) as servers:
        line = f"the server at {servers[0].url}: its log-probabilities .* leave out temperature"
        with pytest.raises(ServerUnfit, match=line):
            train(servers, shared_store, "generation.temperature=0.7")
        assert len(servers[0].loads) > 3
    assert told(caplog, AWAY) == 1


@pytest.mark.parametrize("path", [SAMPLE["vllm"], LOAD["vllm"]])
def test_without_patience_the_first_failure_of_any_server_ends_the_run(
    small_model: Path, shared_store: str, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    """Whether it draws or loads; the other one is well."""
    fault = Fault(path, busy, loads=2, nth=0)
    with fakes(small_model, 2, of_1=[fault]) as servers, pytest.raises(ServerAway, match=servers[1].url):
        train(servers, shared_store, "generation.retry_seconds=0")
    assert fault.met
    assert not told(caplog, AWAY)


def test_a_list_that_cannot_be_meant_is_refused() -> None:
    def refusal(*words: str) -> str:
        with pytest.raises(ConfigError) as caught:
            resolve("tiny", ["generation.backend=vllm_server", *words])
        return str(caught.value)

    two = "generation.base_url=[http://a:1,http://b:2]"
    assert "names http://a:1 twice" in refusal("generation.base_url=[http://a:1,http://a:1/v1]")
    assert "'b': not an address" in refusal("generation.base_url=[http://a:1,b]")
    assert "it shares http://b:2 with generation.base_url, but not all" in refusal(two, "eval.base_url=http://b:2")
    assert "allowed: 1, or generation.server.manage=true" in refusal(two, "generation.server.replicas=2")
    full = ("generation.server.manage=true", "generation.server.replicas=3", "generation.server.port=65534")
    assert "allowed: 0, or at most 65533" in refusal(*full)
    assert "sync = 'restart'" in refusal(two, "generation.sync=restart")
    assert resolve("tiny", ["generation.backend=vllm_server", two]).config.generation.base_url == (
        "http://a:1",
        "http://b:2",
    )


@pytest.mark.parametrize(
    ("device", "replicas", "visible", "trainers", "expected"),
    [
        ("auto", 1, 0, (), [()]),
        ("cpu", 2, 8, (0,), [(), ()]),
        ("auto", 1, 1, (0,), [(0,)]),  # beside the trainer
        ("auto", 1, 8, (0,), [(1, 2, 3, 4, 5, 6, 7)]),  # for tensor parallelism
        ("auto", 7, 8, (0,), [(n,) for n in range(1, 8)]),
        ("auto", 3, 8, (0, 1), [(2, 3), (4, 5), (6, 7)]),
        ("auto", 4, 4, (0, 1), [(2,), (3,), (2,), (3,)]),
        ("auto", 2, 4, (0, 1, 2, 3), [(0, 1), (2, 3)]),
        ("cuda:2", 2, 4, (0,), [(2,), (3,)]),
    ],
)
def test_servers_take_the_gpus_that_no_trainer_has(
    device: str, replicas: int, visible: int, trainers: tuple[int, ...], expected: list[tuple[int, ...]]
) -> None:
    assert gpus(device, replicas, visible, trainers) == expected
