"""Tracking against real MLflow stores, one of which dies and comes back."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import mlflow
import pytest

from grpo_mlflow import tracking
from grpo_mlflow.config.schema import TrackingConfig
from grpo_mlflow.errors import StoreAway, UserError
from grpo_mlflow.runs.stored import find
from grpo_mlflow.training.checkpoint import CheckpointStore
from tests.support.artifacts import Artifacts, serving
from tests.support.mlflow_server import Server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    made.start()
    yield made
    made.stop()


def save(folder: Path) -> None:
    (folder / "model.txt").write_text("weights")


def test_a_run_in_sqlite_has_what_was_logged(store: str, tmp_path: Path) -> None:
    tracker = tracking.start(TrackingConfig(uri=store, experiment="e", run_name="named"), "train")
    tracker.params({"train.lr": 1e-5, "generation.base_url": "http://me:secret@host/"})
    tracker.params({"train.lr": "0.00001", "seed": 0})  # another spelling of a known one must not raise
    tracker.metrics({"train/a": 1.0, "train/b": float("nan")}, 3)
    tracker.text("config/resolved.yaml", "uri: postgresql://me:secret@host/db\n")
    tracker.table("samples/eval.json", {"prompt": ["1+1="], "success": [True]})
    tracker.finish("KILLED")
    client = mlflow.MlflowClient(store)
    run = client.get_run(tracker.run_id)
    assert run.info.status == "KILLED"
    assert run.info.run_name == "named"
    assert run.data.params == {"train.lr": "1e-05", "generation.base_url": "http://***@host/", "seed": "0"}
    assert (run.data.metrics["train/a"], client.get_metric_history(tracker.run_id, "train/a")[0].step) == (1.0, 3)
    assert run.data.tags["grpo.kind"] == "train"
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": "samples/eval.json", "type": "table"}]
    text = tracking.artifact(client, tracker.run_id, "config/resolved.yaml").read_text()
    assert text == "uri: postgresql://***@host/db\n"
    assert tracker.run_dir.is_relative_to(tmp_path)  # beside the database, not in the current folder
    assert not (tracker.run_dir / "spool.jsonl").exists()


def test_a_run_may_have_any_number_of_tables_and_repeat_one(store: str) -> None:
    tracker = tracking.start(TrackingConfig(uri=store), "train")
    tables = [f"samples/eval_iter_{number:06d}.json" for number in range(200)]
    for name in tables:
        tracker.table(
            name, {"prompt": ["1+1=", "\ud800"], "reward": [1.0, float("nan")], "answer": [Fraction(1, 2), None]}
        )
    tracker.finish("KILLED")
    again = tracking.start(TrackingConfig(uri=store), "train", resume=tracker.run_id)
    again.table(tables[-1], {"prompt": ["1+1="], "reward": [0.5]})
    again.finish("FINISHED")
    client = mlflow.MlflowClient(store)
    run = client.get_run(tracker.run_id)
    listed = [table["path"] for table in json.loads(run.data.tags["mlflow.loggedArtifacts"])]
    assert listed == tables[-len(listed) :]
    assert len(listed) >= 50
    experiment = run.info.experiment_id
    assert client.load_table(experiment, tables[-1], [tracker.run_id]).to_dict("list") == {
        "prompt": ["1+1="],
        "reward": [0.5],
    }
    first = client.load_table(experiment, tables[-2], [tracker.run_id])
    assert [first["answer"][0], *first["answer"].isna()] == ["1/2", False, True]
    assert first["reward"].isna().tolist() == [False, True]


def test_a_run_made_by_mlflow_run_is_adopted(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = tracking.connect(store)
    made = client.create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", made)
    tracker = tracking.start(TrackingConfig(uri=store), "train")
    assert tracker.run_id == made
    assert client.get_experiment_by_name("grpo") is None


def test_resuming_continues_the_run_and_says_so_in_the_one_of_mlflow_run(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tracking.start(TrackingConfig(uri=store), "train")
    for step, value in enumerate([0.5, 0.4, 0.3]):
        first.metrics({"train/loss_total": value, "perf/seconds": step}, step)
    first.finish("FAILED")
    client = tracking.connect(store)
    wrapper = client.create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", wrapper)
    again = tracking.start(TrackingConfig(uri=store), "train", resume=first.run_id)
    assert again.run_id == first.run_id
    assert client.get_run(first.run_id).info.status == "RUNNING"
    assert client.get_run(wrapper).data.tags["mlflow.parentRunId"] == first.run_id
    assert client.get_run(wrapper).data.tags["grpo.resumed"] == first.run_id
    again.metrics({"train/loss_total": 0.3, "perf/seconds": 9.0}, 2)  # repeated exactly: not logged twice
    again.metrics({"train/loss_total": 0.2, "perf/seconds": 1.0}, 3)
    again.finish("FINISHED")
    history = client.get_metric_history(first.run_id, "train/loss_total")
    assert [(point.step, point.value) for point in history] == [(0, 0.5), (1, 0.4), (2, 0.3), (3, 0.2)]


@pytest.mark.parametrize(
    ("uri", "named"),
    [("nonsense://x", "nonsense"), ("sqlite:////dev/null/m.db", "m.db"), ("http://127.0.0.1:9", "127.0.0.1:9")],
)
def test_a_store_that_is_not_there_is_refused_in_one_line(uri: str, named: str) -> None:
    with pytest.raises(UserError, match=named) as caught:
        tracking.start(TrackingConfig(uri=uri), "train")
    assert "\n" not in str(caught.value)


def test_a_run_that_is_not_there_is_refused(store: str) -> None:
    with pytest.raises(UserError, match="f" * 32):
        tracking.start(TrackingConfig(uri=store), "train", resume="f" * 32)


def test_what_the_store_never_takes_does_not_hold_up_the_rest(store: str) -> None:
    tracker = tracking.start(TrackingConfig(uri=store), "train")
    tracker.metrics({"train/reward_a@b": 1.0}, 0)
    tracker.tags({"": "a tag without a name"})
    tracker.metrics({"train/a": 2.0}, 0)
    tracker.finish("FINISHED")
    run = mlflow.MlflowClient(store).get_run(tracker.run_id)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"train/reward_a_b": 1.0, "train/a": 2.0})
    assert not (tracker.run_dir / "spool.jsonl").exists()
    assert json.loads((tracker.run_dir / "refused.jsonl").read_text()) == ["tags", {"": "a tag without a name"}]


class Slow(Artifacts):
    """A server of artifacts that answers only when it has passed a file on."""

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(2.0)
        self.send_response(200)
        self.end_headers()


def test_a_file_may_take_longer_than_another_answer(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.chdir(tmp_path)
    with serving(Slow) as address:
        tracking.connect(store).create_experiment("slow", address)
        tracker = tracking.start(TrackingConfig(uri=store, experiment="slow"), "train")
        tracker.text("config/resolved.yaml", "seed: 0")
        tracker.finish("FINISHED")
    assert not (tracker.run_dir / "spool.jsonl").exists()
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "1"


class Failing(Artifacts):
    """A server of artifacts that lists checkpoints and does not give them."""

    def do_GET(self) -> None:
        asked = parse_qs(urlparse(self.path).query).get("path")
        if asked:
            names = ("iter_001", "iter_002") if asked[0].endswith("/checkpoints") else ()
            answer = json.dumps({"files": [{"path": name, "is_dir": True} for name in names]})
        else:
            answer = "tracking: {uri: null}\n" if self.path.endswith("/resolved.yaml") else ""
        self.send_response(200 if answer else 503)
        self.end_headers()
        self.wfile.write(answer.encode())


def test_a_checkpoint_that_cannot_be_fetched_is_not_passed_over(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with serving(Failing) as address:
        tracking.connect(store).create_experiment("failing", address)
        tracker = tracking.start(TrackingConfig(uri=store, experiment="failing"), "train")
        with pytest.raises(StoreAway, match=f"run {tracker.run_id}: checkpoints/iter_002"):
            find(tracker.run_id, store)


@pytest.mark.slow
def test_mlflow_does_not_print_the_address_with_its_password(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    tracker = tracking.start(TrackingConfig(uri=server.uri.replace("//", "//me:pl4nted-pw@")), "train")
    tracker.finish("FINISHED")
    run = mlflow.MlflowClient(server.uri).get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    printed = capfd.readouterr()
    assert "pl4nted-pw" not in printed.out + printed.err + str(run.to_dictionary())


def test_a_server_that_dies_loses_nothing(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tracker = tracking.start(TrackingConfig(uri=server.uri), "train")
    tracker.text("config/resolved.yaml", "tracking: {uri: null}\n")
    checkpoints = CheckpointStore(tracker.run_dir / "checkpoints", 2)
    tracker.publish(f"checkpoints/{checkpoints.save(1, None, save).name}")
    tracker.metrics({"train/a": 0.0}, 0)
    server.stop()
    for step in range(1, 30):
        started = time.monotonic()
        tracker.metrics({"train/a": float(step)}, step)
        assert time.monotonic() - started < 30  # never the minutes that MLflow's own retries take
    tracker.text("metrics/train_iter_001.json", "{}")
    tracker.publish(f"checkpoints/{checkpoints.save(2, None, save).name}")
    with pytest.raises(StoreAway):
        find(tracker.run_id, server.uri)
    tracker.table("samples/eval.json", {"prompt": ["1+1="]})
    tracker.finish("FAILED")
    spool = tracker.run_dir / "spool.jsonl"
    kept = [json.loads(line) for line in spool.read_text().splitlines()]
    assert [step for kind, *values in kept if kind == "metrics" for _, step, _ in values[0]] == list(range(30))
    with spool.open("a") as stream:
        stream.write('["tags", {"cut": "o')  # by a full disk
    server.start()
    client = mlflow.MlflowClient(server.uri)
    for _ in range(2):  # before what waits is sent
        stored = find(tracker.run_id, server.uri)
        assert stored.checkpoint is not None
        assert stored.checkpoint.iteration == 2
        client.log_artifact(tracker.run_id, str(stored.checkpoint.path / "model.txt"), "checkpoints/iter_002")
        # and once more, as after an upload that was cut off
    with pytest.raises(UserError, match="has no artifact checkpoints/iter_003") as absent:
        tracking.artifact(client, tracker.run_id, "checkpoints/iter_003")
    assert not isinstance(absent.value, StoreAway)
    again = tracking.start(TrackingConfig(uri=server.uri), "train", resume=tracker.run_id)
    again.metrics({"train/a": 30.0}, 30)
    again.table("samples/next.json", {"prompt": ["1+1="]})
    again.finish("FINISHED")
    assert not spool.exists()
    listed = json.loads(client.get_run(tracker.run_id).data.tags["mlflow.loggedArtifacts"])
    assert [table["path"] for table in listed] == ["samples/eval.json", "samples/next.json"]
    history = client.get_metric_history(tracker.run_id, "train/a")
    assert [(point.step, point.value) for point in history] == [(step, float(step)) for step in range(31)]
    assert client.get_run(tracker.run_id).info.status == "FINISHED"
    assert {item.path for item in client.list_artifacts(tracker.run_id)} >= {"metrics", "samples"}
    downloaded = tracking.artifact(client, tracker.run_id, "metrics/train_iter_001.json")
    assert downloaded.read_text() == "{}"
    shutil.rmtree(tracker.run_dir)
    assert find(tracker.run_id, server.uri).checkpoint is not None
