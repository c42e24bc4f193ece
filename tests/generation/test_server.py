"""Syncing, proving and sharing a server: what happens between an update and the first token drawn with it."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from grpo_mlflow.config import resolve
from grpo_mlflow.config.engines import SERVERS
from grpo_mlflow.errors import ServerFailed
from grpo_mlflow.generation import Generators, Sampling
from grpo_mlflow.model.policy import Policy
from grpo_mlflow.runtime.http.client import Client, Fault, Loop, Refusal
from grpo_mlflow.runtime.http.retries import Retries
from tests.support.conformance import ids_of, prompts
from tests.support.fake_server import DIALECTS, SAMPLE, FakeServer, Quirks
from tests.support.fake_server import Fault as Scripted
from tests.support.served import served

EACH_DIALECT = pytest.mark.parametrize("dialect", DIALECTS)


def move(policy: Policy, size: float) -> None:
    """Change all weights a little, as a training step does."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


@EACH_DIALECT
def test_a_preset_pointed_at_another_server_evaluates_there_too(policy: Policy, folder: Path, dialect: str) -> None:
    words = ["generation.behaviour_logprobs=recompute", "generation.retry_seconds=0"]
    with FakeServer(dialect, folder) as server:
        words += [f"generation.backend={dialect}_server", f"generation.base_url={server.url}"]
        with Generators(resolve("qwen", words).config, policy, folder, folder, folder / "log", print) as generators:
            generator = generators.evaluation()
            generator.sync(0)
            assert len(generator.generate(prompts(policy), 1, Sampling(4), 0, ("x",))) == len(prompts(policy))


@EACH_DIALECT
def test_each_sync_brings_the_new_weights(policy: Policy, folder: Path, dialect: str) -> None:
    with FakeServer(dialect, folder) as server, served(policy, server) as generators:
        generator, seen = generators.training(), []
        for version in range(3):
            generator.sync(version)
            groups = generator.generate(prompts(policy), 2, Sampling(8), 0, ("x",))
            assert {c.policy_version for group in groups for c in group} == {version}
            seen.append(ids_of(groups))
            assert generator.metrics()["server_canary_error"] < 1e-5
            move(policy, 0.05)
        assert seen[0] != seen[1] != seen[2]
        assert len(server.loads) == 3


@EACH_DIALECT
def test_a_server_that_keeps_old_weights_is_caught_at_once(policy: Policy, folder: Path, dialect: str) -> None:
    quirks = Quirks(keeps_old_weights=True)
    with FakeServer(dialect, folder, quirks=quirks) as server, served(policy, server) as generators:
        generator = generators.training()
        generator.sync(0)  # it has these
        move(policy, 0.05)
        with pytest.raises(ServerFailed, match="given new weights, but its log-probabilities of fixed tokens"):
            generator.sync(1)


@EACH_DIALECT
def test_prefixes_cached_with_old_weights_are_caught(policy: Policy, folder: Path, dialect: str) -> None:
    """Scoring a prompt does not read the cache: only what is drawn after it shows the old prefix."""
    quirks = Quirks(keeps_prefixes=True)
    with FakeServer(dialect, folder, quirks=quirks) as server, served(policy, server) as generators:
        generator = generators.training()
        generator.sync(0)
        move(policy, 0.05)
        with pytest.raises(ServerFailed, match="it reads cached prefixes of other weights"):
            generator.sync(1)


@EACH_DIALECT
def test_weights_are_loaded_while_the_server_is_paused(policy: Policy, folder: Path, dialect: str) -> None:
    with FakeServer(dialect, folder) as server, served(policy, server) as generators:
        generators.training().sync(0)
        server.calls.clear()
        move(policy, 0.05)
        generators.training().sync(1)
        expected = DIALECTS[dialect].loading
        assert tuple(server.calls[: len(expected)]) == expected
        assert not server.paused


@EACH_DIALECT
def test_a_server_left_paused_by_a_killed_trainer_is_resumed(policy: Policy, folder: Path, dialect: str) -> None:
    with FakeServer(dialect, folder) as server, served(policy, server, timeout=2.0) as generators:
        server.paused = True
        generators.training().sync(0)
        assert not server.paused


@EACH_DIALECT
def test_a_server_that_cannot_prove_its_weights_is_refused(policy: Policy, folder: Path, dialect: str) -> None:
    quirks = Quirks(without_scores=True)
    with FakeServer(dialect, folder, quirks=quirks) as server, served(policy, server) as generators:
        began = time.monotonic()
        with pytest.raises(ServerFailed, match="does not score the tokens of a prompt"):
            generators.training().sync(0)
        assert time.monotonic() - began < 10  # at once, not after retries


def test_a_resumed_run_knows_what_a_static_server_should_serve(policy: Policy, folder: Path) -> None:
    quirks = Quirks(without_development=True)
    move(policy, 0.05)  # the policy of version 5; the folder holds version 0
    with FakeServer("vllm", folder, quirks=quirks) as server, served(policy, server, sync="none") as generators:
        generator = generators.training()
        generator.sync(5)
        found = generator.generate(prompts(policy), 1, Sampling(2), 0, ())
        assert {c.policy_version for group in found for c in group} == {0}
    policy.save(folder)
    with FakeServer("vllm", folder, quirks=quirks) as server:
        policy.save(folder)
        with served(policy, server, sync="none") as generators:
            move_server(server)
            with pytest.raises(ServerFailed, match="does not serve the policy"):
                generators.training().sync(5)


def test_old_weights_are_caught_though_the_step_was_too_small_for_the_tolerance(policy: Policy, folder: Path) -> None:
    quirks = Quirks(keeps_old_weights=True, without_extension=True)
    with FakeServer("vllm", folder, quirks=quirks) as server, served(policy, server) as generators:
        generator = generators.training()
        generator.sync(0)
        move(policy, 1e-5)
        with pytest.raises(ServerFailed, match="stayed where they were with the old weights"):
            generator.sync(1)


def test_vllms_own_loader_serves_where_the_extension_is_missing(policy: Policy, folder: Path) -> None:
    with FakeServer("vllm", folder, quirks=Quirks(without_extension=True)) as server:
        with served(policy, server) as generators:
            generators.training().sync(0)
            move(policy, 0.05)
            generators.training().sync(1)
        assert len(server.loads) == 2


def test_a_static_server_keeps_the_initial_weights(policy: Policy, folder: Path) -> None:
    quirks = Quirks(without_development=True)
    with FakeServer("vllm", folder, quirks=quirks) as server, served(policy, server, sync="none") as generators:
        generator = generators.training()
        generator.sync(0)
        first = generator.generate(prompts(policy), 2, Sampling(8), 0, ("x",))
        move(policy, 0.05)
        generator.sync(1)
        again = generator.generate(prompts(policy), 2, Sampling(8), 0, ("x",))
        assert again == first
        assert {c.policy_version for group in again for c in group} == {0}
        server.restart()
        move_server(server)
        with pytest.raises(ServerFailed, match="does not serve the policy"):
            generator.generate(prompts(policy), 2, Sampling(8), 0, ("x",))


def move_server(server: FakeServer) -> None:
    with torch.no_grad():
        for parameter in server.model.parameters():
            parameter.add_(0.05)


@EACH_DIALECT
def test_rollouts_can_be_priced_by_the_trainer_where_a_server_gives_no_logprobs(
    policy: Policy, folder: Path, dialect: str
) -> None:
    sampling = Sampling(8, 0.8, 0.9, 20, 1.2)
    with FakeServer(dialect, folder) as server, served(policy, server) as generators:
        generators.training().sync(0)
        full = generators.training().generate(prompts(policy), 2, sampling, 0, ("x",))
    bare = FakeServer(dialect, folder, quirks=Quirks(without_logprobs=True))
    with bare, served(policy, bare) as generators, pytest.raises(ServerFailed, match="behaviour_logprobs=recompute"):
        generators.training().sync(0)
    bare = FakeServer(dialect, folder, quirks=Quirks(without_logprobs=True))
    with bare, served(policy, bare, behaviour_logprobs="recompute") as generators:
        generators.training().sync(0)
        anew = generators.training().generate(prompts(policy), 2, sampling, 0, ("x",))
    assert ids_of(anew) == ids_of(full)
    if DIALECTS[dialect].shaped_logprobs:  # others do not know top-k and top-p, and must differ
        for one, other in zip((c for g in full for c in g), (c for g in anew for c in g), strict=True):
            assert one.behaviour_logprobs == pytest.approx(other.behaviour_logprobs, abs=1e-4)


@pytest.mark.parametrize("name", SERVERS)
def test_a_repetition_penalty_is_trained_on_where_it_is_the_trainers_own(
    policy: Policy, folder: Path, name: str
) -> None:
    """vLLM's falls on prompt and completion; SGLang's is scheduled before the newest token is known."""
    dialect, shaping = name.removesuffix("_server"), {"temperature": 0.8, "repetition_penalty": 1.8}
    with FakeServer(dialect, folder) as server, served(policy, server, **shaping) as generators:
        if SERVERS[name].penalises_as_here:
            generators.training().sync(0)
        else:
            with pytest.raises(ServerFailed, match="differ from the trainer's"):
                generators.training().sync(0)


@EACH_DIALECT
def test_no_more_prompts_than_asked_for_are_in_flight_and_results_keep_their_order(
    policy: Policy, folder: Path, dialect: str
) -> None:
    def slow(server: FakeServer, answer: tuple[int, object]) -> tuple[int, object]:
        time.sleep(0.3)
        return answer

    given = [*prompts(policy), *prompts(policy)]
    with FakeServer(dialect, folder) as server, served(policy, server, batch_size=2) as generators:
        generator = generators.training()
        generator.sync(0)
        server.most_at_once = 0
        server.faults.append(Scripted(SAMPLE[dialect], slow, loads=1, nth=0))  # the first prompt answers last
        found = ids_of(generator.generate(given, 2, Sampling(6), 0, ("x",)))
        assert server.most_at_once == 2
    assert found[:3] == found[3:]
    assert found[0] != found[1]


def test_a_signal_while_waiting_cancels_the_requests(policy: Policy, folder: Path) -> None:
    class Stop(BaseException):
        pass

    over = threading.Event()

    def hang(server: FakeServer, answer: tuple[int, object]) -> tuple[int, object]:
        over.wait(60)
        return answer

    def raise_stop(*_: object) -> None:
        raise Stop

    with FakeServer("vllm", folder) as server, served(policy, server) as generators:
        generator = generators.training()
        generator.sync(0)
        server.faults.append(Scripted("/v1/completions", hang, loads=1, nth=0))
        before = signal.signal(signal.SIGUSR1, raise_stop)
        try:
            threading.Timer(
                0.5, lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
            ).start()
            began = time.monotonic()
            with pytest.raises(Stop):
                generator.generate(prompts(policy), 2, Sampling(6), 0, ("x",))
            assert time.monotonic() - began < 50
        finally:
            over.set()
            signal.signal(signal.SIGUSR1, before)


def test_work_under_way_has_ended_when_the_loop_closes() -> None:
    ended, begun = list[str](), threading.Event()

    async def work() -> None:
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.1)  # as closing a response takes a while
            ended.append("work")

    async def last() -> None:
        ended.append("last")

    loop = Loop()
    future = loop.start(work())
    begun.wait()
    assert loop.close(last)
    assert ended == ["work", "last"]
    assert future.cancelled()


def test_a_close_that_takes_too_long_is_told() -> None:
    loop = Loop()
    assert not loop.close(partial(asyncio.sleep, 1), seconds=0.1)


@pytest.mark.parametrize(
    ("failures", "seconds", "succeeds"), [(0, 0.0, True), (3, 30.0, True), (1, 0.0, False), (10**6, 0.5, False)]
)
def test_retries_end_with_their_budget(
    failures: int, seconds: float, succeeds: bool, caplog: pytest.LogCaptureFixture
) -> None:
    tries, mended = [], []

    async def request() -> str:
        tries.append(1)
        if len(tries) <= failures:
            raise Fault("busy")
        return "done"

    async def mend() -> None:
        mended.append(1)

    retries, loop = Retries("http://me:hunter2@host:1", seconds), Loop()
    began = time.monotonic()
    if succeeds:
        assert loop.run(retries.ask("asking", request, mend)) == "done"
        assert retries.count == len(mended) == failures
    else:
        with pytest.raises(ServerFailed, match="asking failed for 0.5 s .*busy" if seconds else "asking failed: busy"):
            loop.run(retries.ask("asking", request, mend))
        assert time.monotonic() - began < seconds + 2
    loop.close()
    told = f"the server at http://***@host:1: asking: busy; asking again for {seconds:g} s (generation.retry_seconds)"
    assert [told in record.getMessage() for record in caplog.records] == [True] * bool(failures and seconds)


def test_requests_that_fail_together_are_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    failed = set[int]()

    async def request(number: int) -> int:
        if number not in failed:
            failed.add(number)
            raise Fault("busy")
        return number

    async def mend() -> None:
        pass

    async def batch() -> list[int]:
        asked = (retries.ask("asking", partial(request, number), mend) for number in range(64))
        return await asyncio.gather(*asked)

    retries, loop = Retries("http://host:1", 30.0), Loop()
    assert loop.run(batch()) == list(range(64))
    loop.close()
    assert len(caplog.records) == 1
    assert retries.count == 64


@pytest.mark.parametrize("path", ["/v1/models", "/nowhere"])
def test_the_client_tells_what_may_pass_from_what_will_not(folder: Path, path: str) -> None:
    loop = Loop()

    def outcome(action: Callable[[], object]) -> str:
        try:
            action()
        except (Fault, Refusal) as error:
            return type(error).__name__
        return "answer"

    with FakeServer("vllm", folder) as server:
        client = Client(f"{server.url}/v1/", 5.0)
        assert outcome(lambda: loop.run(client.get(path))) == ("answer" if path == "/v1/models" else "Refusal")
    assert outcome(lambda: loop.run(client.get(path))) == "Fault"
    loop.close(client.close)


def test_a_failure_to_connect_is_told_from_a_timeout() -> None:
    loop = Loop()

    def told(url: str) -> str:
        client = Client(url, 0.5)
        with pytest.raises(Fault) as caught:
            loop.run(client.get("/v1/models"))
        loop.run(client.close())
        return str(caught.value)

    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert told(url) == "/v1/models does not answer in time"
    assert "cannot connect: ConnectionRefusedError" in told(url)
    loop.close()
