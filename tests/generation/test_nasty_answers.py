"""Forty and more nasty answers, given once and forever: a retry or one line, and never a wrong rollout.

Given once, an answer leaves completions and a run's numbers as they are without it. Given forever, it ends in one line.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from grpo_mlflow import runs
from grpo_mlflow.config import Resolved, TinyConfig, resolve
from grpo_mlflow.errors import ServerFailed
from grpo_mlflow.generation import Generator, Sampling
from grpo_mlflow.model import tiny
from grpo_mlflow.types import Completion, Prompt
from tests.support.conformance import prompts
from tests.support.fake_server import DIALECTS, SAMPLE, FakeServer, Fault
from tests.support.nasty_answers import FOLLOWED, LASTING, PASSING, SLOW, Change
from tests.support.served import served
from tests.support.small_runs import SMALL

ONCE = PASSING | FOLLOWED | SLOW
FOREVER = PASSING | LASTING | FOLLOWED | SLOW
SAMPLING = Sampling(12)
TIMEOUT = 1.0


class Always(Fault):
    """Goes wrong with every request that asks for several completions."""

    def strikes(self, path: str, loads: int, body: dict[str, Any]) -> bool:
        struck = path == self.path and loads >= self.loads
        self.met += struck
        return struck


@dataclass(frozen=True)
class Served:
    """A server with a generator over it that retries, one that does so for a moment only, and what is right."""

    server: FakeServer
    patient: Generator
    hasty: Generator
    given: list[Prompt]
    expected: list[list[Completion]]

    def generate(self, generator: Generator) -> list[list[Completion]]:
        return generator.generate(self.given, 4, SAMPLING, 0, ("x",))


@pytest.fixture(scope="module", params=DIALECTS)
def under_test(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    policy, folder = tiny.build(TinyConfig(hidden_size=32, layers=2, heads=2, seed=3)), tmp_path_factory.mktemp("model")
    policy.save(folder)
    with ExitStack() as stack:
        server = stack.enter_context(FakeServer(request.param, folder))
        patient, hasty = (
            stack.enter_context(served(policy, server, retry_seconds=seconds, timeout=TIMEOUT)).training()
            for seconds in (20.0, 0.1)
        )
        patient.sync(0)
        hasty.sync(0)
        given = prompts(policy)[:2]
        yield Served(server, patient, hasty, given, patient.generate(given, 4, SAMPLING, 0, ("x",)))


@pytest.fixture
def struck(under_test: Served) -> Iterator[Served]:
    """`under_test`, with what goes wrong taken away at the end; both generators have other work behind them."""
    under_test.patient.metrics()
    yield under_test
    under_test.server.faults.clear()


def met(struck: Served, name: str, forever: bool) -> None:
    """Skip an answer in one of two tongues: each is met once in one and forever in the next, and all in whole runs."""
    if (list(FOREVER).index(name) + list(DIALECTS).index(struck.server.dialect)) % 2 == forever:
        pytest.skip("in the other tongue")


@pytest.mark.parametrize("name", ONCE)
def test_once_it_changes_no_completion(struck: Served, name: str) -> None:
    met(struck, name, forever=False)
    struck.server.faults.append(Fault(SAMPLE[struck.server.dialect], ONCE[name], loads=1, nth=0))
    assert struck.generate(struck.patient) == struck.expected
    assert struck.server.faults[0].met > 0  # it did strike
    assert struck.patient.metrics()["server_retries"] > 0 or name in FOLLOWED


@pytest.mark.parametrize("name", LASTING)
def test_what_asking_again_does_not_mend_ends_at_once(struck: Served, name: str) -> None:
    struck.server.faults.append(Fault(SAMPLE[struck.server.dialect], LASTING[name], loads=1, nth=0))
    began = time.monotonic()
    with pytest.raises(ServerFailed, match="refuses"):
        struck.generate(struck.patient)
    assert time.monotonic() - began < 10  # of the 20 of its retries
    struck.server.faults.clear()
    assert struck.generate(struck.patient) == struck.expected  # no request is left that the next fault could strike


@pytest.mark.parametrize("name", FOREVER)
def test_forever_it_ends_in_one_line(struck: Served, name: str) -> None:
    met(struck, name, forever=True)
    struck.server.faults.append(Always(SAMPLE[struck.server.dialect], FOREVER[name], loads=1))
    with pytest.raises(ServerFailed) as caught:
        struck.generate(struck.hasty)
    told = str(caught.value)
    assert len(told.splitlines()) == 1
    assert struck.server.url in told
    assert len(told) < 600
    struck.server.faults.clear()
    assert struck.generate(struck.hasty) == struck.expected  # nothing of it stayed behind


def configured(server: FakeServer, store: str) -> Resolved:
    words = ["train.iterations=3", "eval.enabled=false", f"generation.timeout={TIMEOUT}", "generation.batch_size=2"]
    words += [f"generation.backend={server.dialect}_server", f"generation.base_url={server.url}"]
    words += [f"tracking.uri={store}", "data.problems_per_iteration=20"]
    return resolve("tiny", [*SMALL, *words])


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    """The training metrics of all iterations, without times and what says how the server fared."""
    found = [json.loads(path.read_text()) for path in sorted((run_dir / "metrics").glob("train_iter_*.json"))]
    timed = ("seconds_", "server_", "share_", "mfu", "peak_")
    return [{k: v for k, v in each.items() if not k.startswith(timed) and "per_sec" not in k} for each in found]


def spread(changes: dict[str, Change], dialect: str) -> list[Fault]:
    """Let each strike once, every other request from the first on."""
    return [Fault(SAMPLE[dialect], change, loads=0, nth=2 * i) for i, change in enumerate(changes.values())]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_run_that_meets_all_of_them_has_the_numbers_of_one_that_meets_none(
    dialect: str, small_model: Path, shared_store: str
) -> None:
    with FakeServer(dialect, small_model) as server:
        expected = numbers(runs.train(configured(server, shared_store)).run_dir)
    with FakeServer(dialect, small_model, spread(ONCE, dialect)) as server:
        found = numbers(runs.train(configured(server, shared_store)).run_dir)
        assert all(fault.met > fault.nth for fault in server.faults)
    assert len(expected) == 3
    assert found == expected
