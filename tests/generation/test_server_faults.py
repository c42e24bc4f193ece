"""Whatever a server does wrong, a run's numbers are those of an undisturbed run, or it stops and can be resumed.

Each fault strikes once, in the second iteration, over real HTTP. With retries the metrics of every iteration equal the
undisturbed run's to the last bit; without, the run stops with one line, and resumed with a server that works it ends
with those same metrics.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_mlflow import runs
from grpo_mlflow.config import Resolved, parse_arguments, resolve
from grpo_mlflow.errors import ServerFailed
from grpo_mlflow.runs.stored import resolve_training
from tests.support.answers import counted, finish, ids, logprobs, raising, status
from tests.support.fake_server import DIALECTS, LOAD, SAMPLE, Answer, Dropped, FakeServer, Fault, Truncated
from tests.support.small_runs import SMALL

Undisturbed = tuple[str, list[dict[str, Any]]]  # dialect, metrics of each iteration


def _slow(server: FakeServer, answer: Answer) -> Answer:
    time.sleep(2.5)
    return answer


def _restart_dropping(server: FakeServer, answer: Answer) -> Answer:
    server.restart()
    raise Dropped


def _restart_silently(server: FakeServer, answer: Answer) -> Answer:
    server.restart()
    return answer


def _other_model(server: FakeServer, answer: Answer) -> Answer:
    server.restart()
    with torch.no_grad():
        for parameter in server.model.parameters():
            parameter.add_(0.05)
    return answer


def _renamed(server: FakeServer, answer: Answer) -> Answer:
    server.restart()
    server.name = "another"
    raise Dropped


def _away(server: FakeServer, answer: Answer) -> Answer:
    server.away(0.5)
    raise Dropped


def _loses_weights(server: FakeServer, answer: Answer) -> Answer:
    server._take(server.folder)  # answers 200 and goes by the new label, but has the weights of the start
    return answer


S, L = "sample", "load"
FAULTS: dict[str, tuple[str, Callable[[FakeServer, Answer], Answer]]] = {
    "connection dropped": (S, raising(Dropped)),
    "body cut off": (S, raising(Truncated)),
    "JSON cut off": (S, status(200, b'{"choices": [{"index": 0, ')),
    "a proxy's page": (S, status(200, b"<html>please log in</html>")),
    "null": (S, status(200, b"null")),
    "a number": (S, status(200, b"5")),
    "408": (S, status(408)),
    "429": (S, status(429)),
    "500": (S, status(500, {"error": {"message": "EngineCore died"}})),
    "502": (S, status(502, b"<html>Bad Gateway</html>")),
    "503": (S, status(503)),
    "timeout": (S, _slow),
    "no completions": (S, counted(lambda found: [])),
    "one too few": (S, counted(lambda found: found[:-1])),
    "one too many": (S, counted(lambda found: [*found, found[0]])),
    "NaN log-probability": (S, logprobs(lambda values: [float("nan"), *values[1:]])),
    "log-probability above 0": (S, logprobs(lambda values: [0.5, *values[1:]])),
    "null log-probability": (S, logprobs(lambda values: [None, *values[1:]])),
    "a log-probability short": (S, logprobs(lambda values: values[:-1])),
    "no log-probabilities": (S, logprobs(lambda values: None)),
    "no token ids": (S, ids(lambda ids: None)),
    "token outside the vocabulary": (S, ids(lambda ids: [10**6, *ids[1:]])),
    "empty completion": (S, ids(lambda ids: [])),
    "longer than asked for": (S, ids(lambda ids: [5] * 50)),
    "ended without its end": (S, finish("stop")),
    "aborted": (S, finish("abort")),
    "away, back with other weights": (S, _away),
    "restarted in a request": (S, _restart_dropping),
    "restarted between requests": (S, _restart_silently),
    "another model in its place": (S, _other_model),
    "another model's name": (S, _renamed),
    "load fails": (L, status(500)),
    "load dropped": (L, raising(Dropped)),
    "load without effect": (L, _loses_weights),
    "load answers null": (L, status(200, b"null")),
    "load answers a page": (L, status(200, b"<html>please log in</html>")),
    "label cut off": ("label", status(200, b'{"weight_ver')),
    "label null": ("label", status(200, b"null")),
    "label of another kind": ("label", status(200, b"[]")),
    "goes on after its end": (S, ids(lambda ids: [*ids[:-1], 1, 5][-8:])),
}


def fault_of(name: str, dialect: str) -> Fault:
    where, answer = FAULTS[name]
    if where == S:
        return Fault(SAMPLE[dialect], answer)
    if where == "label":
        return Fault(DIALECTS[dialect].label, answer, nth=0)
    return Fault(LOAD[dialect], answer, loads=1, nth=0)


def configured(server: FakeServer, shared_store: str, *overrides: str) -> Resolved:
    words = ["train.iterations=3", "eval.interval=3", "eval.num_ids=2", "eval.greedy=false", "generation.timeout=2"]
    words += [f"generation.backend={server.dialect}_server", f"generation.base_url={server.url}"]
    words += [f"tracking.uri={shared_store}", "generation.batch_size=2", "eval.backend=local", "checkpoint.keep_last=9"]
    return resolve("tiny", [*SMALL, *words, *overrides])


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    """The training metrics of all iterations, without times and what says how the server fared."""
    found = [json.loads(path.read_text()) for path in sorted((run_dir / "metrics").glob("train_iter_*.json"))]
    timed = ("seconds_", "server_", "share_", "mfu", "peak_")
    return [{k: v for k, v in each.items() if not k.startswith(timed) and "per_sec" not in k} for each in found]


@pytest.fixture(scope="module", params=DIALECTS)
def undisturbed(request: pytest.FixtureRequest, small_model: Path, shared_store: str) -> Undisturbed:
    with FakeServer(request.param, small_model) as server:
        finished = runs.train(configured(server, shared_store))
    return request.param, numbers(finished.run_dir)


def met_by(dialect: str, name: str, retrying: bool) -> bool:
    """Each fault is met with retries in one tongue and without in the next: what follows does not depend on it."""
    if name == "another model's name":
        return DIALECTS[dialect].names_model
    turn = list(FAULTS).index(name) % 2 != list(DIALECTS).index(dialect) % 2
    return turn if retrying else not turn


def test_the_undisturbed_run_trains(undisturbed: Undisturbed) -> None:
    _, expected = undisturbed
    assert len(expected) == 3
    assert len({each["reward_mean"] for each in expected}) > 1
    assert all(abs(each["sampler_ratio_mean"] - 1) < 1e-4 for each in expected)


@pytest.mark.parametrize("name", FAULTS)
def test_with_retries_the_numbers_are_those_of_an_undisturbed_run(
    undisturbed: Undisturbed, small_model: Path, shared_store: str, name: str
) -> None:
    dialect, expected = undisturbed
    if not met_by(dialect, name, retrying=True):
        pytest.skip("in the other tongue")
    with FakeServer(dialect, small_model, [fault_of(name, dialect)]) as server:
        finished = runs.train(configured(server, shared_store))
        assert server.faults[0].met > server.faults[0].nth  # it did strike
    assert numbers(finished.run_dir) == expected
    perf = [json.loads(path.read_text()) for path in sorted((finished.run_dir / "metrics").glob("train_iter_*.json"))]
    met = sum(each["server_retries"] + each["server_redraws"] for each in perf)
    assert met > 0 or name == "load without effect"


@pytest.mark.parametrize("name", FAULTS)
def test_without_retries_it_stops_with_one_line_and_goes_on_where_it_was(
    undisturbed: Undisturbed,
    small_model: Path,
    shared_store: str,
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dialect, expected = undisturbed
    if not met_by(dialect, name, retrying=False):
        pytest.skip("in the other tongue")
    with FakeServer(dialect, small_model, [fault_of(name, dialect)]) as server:
        with pytest.raises(ServerFailed) as caught:
            runs.train(configured(server, shared_store, "generation.retry_seconds=0"))
        message = str(caught.value)
        assert server.url in message
        assert len(message.splitlines()) == 1
        printed = capsys.readouterr().out
        assert "iter_001 is whole" in printed
        run_id = printed.split("resume=")[1].split()[0]
    with FakeServer(dialect, small_model) as server:
        words = (f"resume={run_id}", f"tracking.uri={shared_store}", f"generation.base_url={server.url}")
        arguments = parse_arguments(words, "train", "")
        resolved, stored = resolve_training(arguments, str(arguments.resumes()))
        finished = runs.train(resolved, stored)
    assert finished.run_id == run_id
    assert numbers(finished.run_dir) == expected
