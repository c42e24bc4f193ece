"""What was kept while the store was away is sent a little at a time, in order, and nothing of it again."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import mlflow
import pytest

from grpo_mlflow import runs, tracking
from grpo_mlflow.config.schema import TrackingConfig
from grpo_mlflow.runtime import interrupts
from grpo_mlflow.tracking import outbox, sender, store
from grpo_mlflow.tracking.operation import Operation
from grpo_mlflow.tracking.operations import Status, Tags, Unknown
from grpo_mlflow.tracking.spool import Spool
from tests.support.artifacts import Artifacts, serving
from tests.support.small_runs import small

SECONDS = 0.1  # that a file takes
KEPT = 24
RETRY = 1.0  # longer than a failure takes
LONG = 30.0


class Flaky(Artifacts):
    """A server of artifacts that takes a while, or until `gate` opens, and fails for the names in `refused`."""

    away: ClassVar[bool] = False
    refused: ClassVar[set[str]] = set()
    gate: ClassVar[threading.Event]
    asked: ClassVar[list[str]] = []
    taken: ClassVar[list[str]] = []

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        name = self.path.rpartition("/")[2]
        self.asked.append(name)
        if self.away or name in self.refused or not self.gate.wait(LONG):
            self.send_response(501)  # which MLflow does not try again
        else:
            time.sleep(SECONDS)
            self.taken.append(name)
            self.send_response(200)
        self.end_headers()


@pytest.fixture
def config(
    shared_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[TrackingConfig]:
    """A store whose artifacts are on a flaky server, which is soon tried again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(outbox, "_RETRY_SECONDS", RETRY)
    Flaky.away, Flaky.refused, Flaky.asked, Flaky.taken = False, set(), [], []
    Flaky.gate = threading.Event()
    Flaky.gate.set()
    with serving(Flaky) as address:
        name = request.node.name
        tracking.connect(shared_store).create_experiment(name, address)
        yield TrackingConfig(uri=shared_store, experiment=name)
        Flaky.gate.set()


def _names(first: int = 0, last: int = KEPT) -> list[str]:
    return [f"{number}.json" for number in range(first, last)]


def _write(tracker: tracking.Tracker, names: list[str]) -> None:
    for name in names:
        tracker.text(name, name)


def _until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + LONG
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


def _kept(config: TrackingConfig) -> tracking.Tracker:
    """A run that has ended while its store was away, which is back now."""
    tracker = tracking.start(config, "train")
    Flaky.away = True
    _write(tracker, _names())
    tracker.finish("FAILED")
    Flaky.away = False
    assert Flaky.taken == []
    return tracker


def test_no_write_waits_for_a_store_that_hangs(config: TrackingConfig) -> None:
    tracker = tracking.start(config, "train")
    Flaky.gate.clear()
    _write(tracker, _names())
    _until(lambda: Flaky.asked != [])
    _write(tracker, _names(KEPT, KEPT + 3))
    tracker.metrics({"train/loss_total": 0.5}, 0)
    tracker.tags({"a": "b"})
    tracker.flush()
    assert (Flaky.asked, Flaky.taken) == (_names(0, 1), [])  # and all of the above is done
    Flaky.gate.set()
    tracker.finish("FINISHED")
    assert Flaky.taken == _names(0, KEPT + 3)
    run = mlflow.MlflowClient(config.uri).get_run(tracker.run_id)
    assert (run.info.status, run.data.metrics["train/loss_total"], run.data.tags["a"]) == ("FINISHED", 0.5, "b")


def test_training_goes_on_while_an_upload_hangs(config: TrackingConfig, tmp_path: Path) -> None:
    Flaky.gate.clear()

    def open_at_the_end() -> None:
        _until(lambda: any(tmp_path.glob("outputs/*/checkpoints/iter_003/manifest.json")))
        Flaky.gate.set()

    threading.Thread(target=open_at_the_end, daemon=True).start()
    runs.train(small(str(config.uri), f"tracking.experiment={config.experiment}", "train.iterations=3"))
    assert {"resolved.yaml", "manifest.json", "train_iter_002.json"} <= set(Flaky.taken)
    assert len(Flaky.asked) == len(Flaky.taken)


def test_a_new_failure_does_not_begin_at_the_first_again(config: TrackingConfig) -> None:
    tracker = tracking.start(config, "train")
    Flaky.refused = {"7.json"}
    _write(tracker, _names())
    _until(lambda: Flaky.asked.count("7.json") > 1)
    assert Flaky.taken == _names(0, 7)
    Flaky.refused = set()
    tracker.finish("FINISHED")
    assert Flaky.taken == _names()


def test_a_signal_ends_it_after_what_is_being_sent_and_nothing_is_sent_again(
    config: TrackingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "_LAST_SECONDS", 5 * SECONDS)
    tracker = tracking.start(config, "train")
    _write(tracker, _names())
    with pytest.raises(interrupts.Interrupted), interrupts.handled(), interrupts.deferred():
        threading.Timer(5 * SECONDS, os.kill, (os.getpid(), signal.SIGTERM)).start()
        tracker.finish("KILLED")
    assert 2 <= len(Flaky.taken) < KEPT
    tracking.start(config, "train", resume=tracker.run_id)
    assert Flaky.taken == _names()


def test_what_a_killed_process_had_sent_is_not_sent_again_but_for_the_last_slice(
    config: TrackingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "_SLICE_SECONDS", 0.2)
    tracker = _kept(config)
    process = multiprocessing.get_context("fork").Process(target=_write_on, args=(config, tracker.run_id))
    process.start()
    _until(lambda: len(Flaky.taken) >= KEPT / 2)
    process.kill()
    process.join()
    time.sleep(2 * SECONDS)  # what was under way arrives
    sent = len(Flaky.taken)
    tracking.start(config, "train", resume=tracker.run_id).finish("FINISHED")
    again = [name for name in Flaky.taken[sent:] if name in Flaky.taken[:sent]]
    assert len(again) <= 4
    assert set(_names()) <= set(Flaky.taken)


def _write_on(config: TrackingConfig, run_id: str) -> None:
    tracking.start(config, "train", resume=run_id)
    time.sleep(LONG)


def test_the_end_of_a_run_waits_for_a_store_that_is_slow(
    config: TrackingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "TRANSFER_SECONDS", 10 * SECONDS)  # for a file; all of them take longer
    tracker = tracking.start(config, "train")
    _write(tracker, _names())
    tracker.finish("FINISHED")
    assert Flaky.taken == _names()
    assert mlflow.MlflowClient(config.uri).get_run(tracker.run_id).info.status == "FINISHED"


def test_the_end_of_a_run_does_not_wait_for_a_store_that_hangs(
    config: TrackingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "TRANSFER_SECONDS", 5 * SECONDS)
    monkeypatch.setattr(sender, "_LAST_SECONDS", SECONDS)
    tracker = tracking.start(config, "train")
    Flaky.gate.clear()
    _write(tracker, _names())
    tracker.finish("FINISHED")
    assert Flaky.taken == []
    assert (tracker.run_dir / "spool.jsonl").exists()
    client = mlflow.MlflowClient(config.uri)
    assert client.get_run(tracker.run_id).info.status == "RUNNING"
    Flaky.gate.set()
    _until(lambda: Flaky.taken == _names(0, 1))  # late, so that it counts as not sent
    assert tracking.send_kept(config.uri, tracker.run_id) == tracking.Upload(tracker.run_id, KEPT + 2, 0)
    assert Flaky.taken == ["0.json", *_names()]
    assert client.get_run(tracker.run_id).info.status == "FINISHED"


def test_a_signal_at_the_end_leaves_the_time_for_a_status(config: TrackingConfig) -> None:
    tracker = tracking.start(config, "train")
    tracker.metrics({"train/loss_total": 0.5}, 0)
    with pytest.raises(interrupts.Interrupted), interrupts.handled(), interrupts.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        tracker.finish("KILLED")
    assert mlflow.MlflowClient(config.uri).get_run(tracker.run_id).info.status == "KILLED"
    assert not (tracker.run_dir / "spool.jsonl").exists()


def test_a_run_that_goes_on_does_not_end_as_it_had_before(config: TrackingConfig) -> None:
    tracker = _kept(config)
    again = tracking.start(config, "train", resume=tracker.run_id)
    assert Flaky.taken == _names()
    run = mlflow.MlflowClient(config.uri).get_run(tracker.run_id)
    assert (run.info.status, run.data.tags.get("grpo.ended")) == ("RUNNING", None)
    again.finish("FINISHED")
    assert mlflow.MlflowClient(config.uri).get_run(tracker.run_id).info.status == "FINISHED"


def test_a_disk_that_fails_for_a_while_stops_nothing(config: TrackingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = tracking.start(config, "train")
    with monkeypatch.context() as patch:
        patch.setattr(Spool, "drop", _full)
        _write(tracker, _names(0, 1))
        _until(lambda: Flaky.taken == _names(0, 1))
        time.sleep(SECONDS)
    _write(tracker, _names(1, 3))
    tracker.finish("FINISHED")
    assert Flaky.taken == ["0.json", *_names(0, 3)]  # what could not be forgotten is sent again
    assert mlflow.MlflowClient(config.uri).get_run(tracker.run_id).info.status == "FINISHED"


def test_transfers_of_several_threads_share_a_time_limit_and_give_it_back() -> None:
    limit, seen = "MLFLOW_HTTP_REQUEST_TIMEOUT", []
    before = os.environ[limit]
    first, second = store.transfer(), store.transfer()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    seen.append(os.environ[limit])
    second.__exit__(None, None, None)
    assert (seen, os.environ[limit]) == (["600"], before)


def test_what_a_full_disk_does_not_take_is_sent_at_once(
    config: TrackingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = tracking.start(config, "train")
    _write(tracker, _names(0, 3))
    monkeypatch.setattr(Spool, "append", _full)
    tracker.tags({"a": "b"})
    assert Flaky.taken == _names(0, 3)  # in order
    assert mlflow.MlflowClient(config.uri).get_run(tracker.run_id).data.tags["a"] == "b"
    Flaky.away = True
    with pytest.raises(OSError, match="No space left"):
        tracker.publish("0.json")


def test_a_resume_does_not_log_again_what_waits(config: TrackingConfig) -> None:
    tracker = tracking.start(config, "train")
    tracker.metrics({"train/loss_total": 0.5}, 0)
    Flaky.away = True
    tracker.text("config/resolved.yaml", "{}")
    tracker.metrics({"train/loss_total": 0.4}, 1)
    tracker.metrics({"eval/pass_at_1": 0.5}, 2)
    tracker.finish("KILLED")
    again = tracking.start(config, "train", resume=tracker.run_id)
    again.metrics({"train/loss_total": 0.4}, 1)
    again.metrics({"eval/pass_at_1": 0.5}, 2)
    again.metrics({"train/loss_total": 0.3}, 2)
    Flaky.away = False
    again.finish("FINISHED")
    client = mlflow.MlflowClient(config.uri)
    points = {key: client.get_metric_history(tracker.run_id, key) for key in ("train/loss_total", "eval/pass_at_1")}
    assert [(p.step, p.value) for p in points["train/loss_total"]] == [(0, 0.5), (1, 0.4), (2, 0.3)]
    assert [(p.step, p.value) for p in points["eval/pass_at_1"]] == [(2, 0.5)]


def waiting(spool: Spool) -> list[Operation]:
    return list(spool.waiting(spool.end()))


def test_what_is_cut_off_while_others_are_read_is_not_read_in_part(tmp_path: Path) -> None:
    spool, operations = Spool(tmp_path / "spool.jsonl"), [Tags({"a": str(number)}) for number in range(4)]
    for operation in operations[:2]:
        spool.append(operation)
    with spool.path.open("a") as stream:
        stream.write('["tags", {"a": "cut off, and longer than what comes in its place')
    reading = spool.waiting(spool.end())
    assert next(reading) == operations[0]
    for operation in operations[2:]:
        Spool(spool.path).append(operation)
    assert list(reading) == operations[1:2]
    assert waiting(spool) == operations


def test_a_line_that_nobody_wrote_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "spool.jsonl"
    path.write_text('[["x"]]\n{}\n[]\nnonsense\n' + "[" * 100_000 + '\n["status", "FINISHED"]\n')
    *damaged, last = waiting(Spool(path))
    assert [type(each) for each in damaged] == [Unknown] * 5
    assert last == Status("FINISHED")


def test_a_spool_forgets_its_first_lines_and_one_that_was_cut_off(tmp_path: Path) -> None:
    spool, operations = Spool(tmp_path / "spool.jsonl"), [Tags({"a": str(number)}) for number in range(4)]
    for operation in operations[:3]:
        spool.append(operation)
    spool.drop(1)
    assert waiting(Spool(spool.path)) == operations[1:3]
    with spool.path.open("a") as stream:
        stream.write('["tags", {"a": "cut o')
    assert waiting(spool) == operations[1:3]
    spool.append(operations[3])
    assert [json.loads(line) for line in spool.path.read_text().splitlines()] == [
        each.as_list() for each in operations[1:]
    ]
    with spool.path.open("a") as stream:
        stream.write('["tags", {"a": "cut o')
    spool.drop(3)
    assert not spool.waits()


def test_what_was_sent_is_forgotten_also_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    spool, operations = Spool(folder / "spool.jsonl"), [Tags({"a": str(number)}) for number in range(4)]
    for operation in operations[:3]:
        spool.append(operation)
    folder.chmod(0o500)
    if os.access(folder, os.W_OK):  # root may write anywhere
        monkeypatch.setattr("grpo_mlflow.tracking.spool.replacing", _full)
    spool.drop(1)
    assert waiting(spool) == operations[1:3]
    spool.append(operations[3])
    spool.drop(1)
    assert waiting(spool) == operations[2:]
    folder.chmod(0o700)
    spool.drop(2)
    assert not spool.waits()


def _full(*_: object, **__: object) -> Iterator[None]:
    raise OSError("No space left on device")
