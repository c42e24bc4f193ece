"""What waits on the disk for a store that is away: its format stays, and each version sends what earlier ones left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import mlflow
import pytest

from grpo_mlflow import tracking
from grpo_mlflow.config.schema import TrackingConfig
from grpo_mlflow.tasks.data_sets import DataSet
from grpo_mlflow.tracking import Kept
from tests.support.artifacts import Artifacts, serving

# As version 0.1 wrote it: every kind of line. RUN_ID and TIME stand for what differs between runs.
SPOOL = """\
["publish", "config/resolved.yaml"]
["params", {"train.lr": "1e-05", "seed": "0"}]
["metrics", [[{"train/a_b": NaN, "train/loss_total": 0.5}, 3, TIME]]]
["publish", "samples/eval.json"]
["tags", {"mlflow.loggedArtifacts": "[{\\"path\\": \\"samples/eval.json\\", \\"type\\": \\"table\\"}]"}]
["remove", "checkpoints/iter_001"]
["register", "study", "champion", "RUN_ID", "checkpoints/iter_002", {"trial": "3"}]
["tags", {"grpo.ended": "FAILED"}]
["status", "FAILED"]
"""
TIME = 1795985248493


class Recording(Artifacts):
    """A server of artifacts that notes what it is asked for."""

    asked: ClassVar[list[tuple[str, str, bytes]]] = []

    def _note(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.asked.append((self.command, self.path.removeprefix("/mlflow-artifacts/artifacts/"), sent))
        self.send_response(200)
        self.end_headers()

    do_PUT = do_DELETE = _note


def test_what_waits_is_on_the_disk_as_before(
    shared_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tracking.connect(shared_store).create_experiment("away", "http://127.0.0.1:9/mlflow-artifacts/artifacts")
    tracker = tracking.start(TrackingConfig(uri=shared_store, experiment="away"), "train")
    tracker.text("config/resolved.yaml", "seed: 0")  # the first thing that the store does not take
    tracker.params({"train.lr": 1e-5, "seed": 0})
    tracker.metrics({"train/a@b": float("nan"), "train/loss_total": 0.5}, 3)
    tracker.table("samples/eval.json", {"prompt": ["1+1="]})
    tracker.remove("checkpoints/iter_001")
    tracker.register("study", "champion", tracker.run_id, "checkpoints/iter_002", {"trial": "3"})
    tracker.finish("FAILED")
    kept = (tracker.run_dir / "spool.jsonl").read_text()
    time = json.loads(kept.splitlines()[2])[1][0][2]
    assert kept == SPOOL.replace("RUN_ID", tracker.run_id).replace("TIME", str(time))


def test_models_wait_on_the_disk_in_a_form_of_their_own(
    shared_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tracking.connect(shared_store).create_experiment("closed", "http://127.0.0.1:9/mlflow-artifacts/artifacts")
    tracker = tracking.start(TrackingConfig(uri=shared_store, experiment="closed"), "train")
    tracker.text("config/resolved.yaml", "seed: 0")  # the first thing that the store does not take
    tracker.data(DataSet("sums", "1" * 8, "evaluation", "generated", {"task": "sums"}, {"num_rows": 9}))
    tags = {"grpo.kept": "best", "at": "http://me:secret@host/"}
    tracker.models(
        tracker.run_id, [Kept("iter_002", "sums iter_002", "ab", 2, {"seed": "0"}, tags, {"eval/pass@1": 1.0})]
    )
    tracker.measured("f" * 32, "iter_002", {"eval/pass@1": 0.5})
    tracker.finish("FINISHED")
    kept = [json.loads(line) for line in (tracker.run_dir / "spool.jsonl").read_text().splitlines()]
    shown = {"grpo.kept": "best", "at": "http://***@host/"}
    model = {"checkpoint": "iter_002", "name": "sums iter_002", "weights": "ab", "step": 2, "params": {"seed": "0"}}
    assert kept[1:4] == [
        ["dataset", "sums", "1" * 8, "evaluation", "generated", {"task": "sums"}, {"num_rows": 9}],
        ["models", tracker.run_id, [{**model, "tags": shown, "metrics": {"eval/pass_1": 1.0}}]],
        ["measured", "f" * 32, "iter_002", {"eval/pass_1": 0.5}],
    ]


def test_what_an_earlier_version_kept_is_sent(
    shared_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    client, config = tracking.connect(shared_store), TrackingConfig(uri=shared_store, experiment="earlier")
    with serving(Recording) as address:
        client.create_experiment("earlier", address)
        first = tracking.start(config, "train")
        for name in ("config/resolved.yaml", "samples/eval.json"):
            (first.run_dir / name).parent.mkdir()
            (first.run_dir / name).write_text(name)
        spool = first.run_dir / "spool.jsonl"
        spool.write_text(SPOOL.replace("RUN_ID", first.run_id).replace("TIME", str(TIME)))
        found = tracking.send_kept(shared_store, first.run_id)
    assert (found.sent, found.left, found.error) == (9, 0, None) if found is not None else False
    assert {path.name for path in first.run_dir.iterdir()} == {"config", "samples"}  # none waits, none was refused
    run = client.get_run(first.run_id)
    assert run.data.params == {"train.lr": "1e-05", "seed": "0"}
    points = client.get_metric_history(first.run_id, "train/loss_total")
    assert [(point.value, point.step, point.timestamp) for point in points] == [(0.5, 3, TIME)]
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": "samples/eval.json", "type": "table"}]
    assert (run.data.tags["grpo.ended"], run.info.status) == ("FAILED", "FAILED")
    home = f"{first.run_id}/artifacts"
    assert Recording.asked == [
        ("PUT", f"{home}/config/resolved.yaml", b"config/resolved.yaml"),
        ("PUT", f"{home}/samples/eval.json", b"samples/eval.json"),
        ("DELETE", f"{home}/checkpoints/iter_001", b""),
    ]
    version = mlflow.MlflowClient(shared_store).get_model_version_by_alias("study", "champion")
    assert (version.run_id, version.tags) == (first.run_id, {"trial": "3"})
    assert version.source.endswith(f"{home}/checkpoints/iter_002")


@pytest.mark.parametrize("line", [["later", "what only a newer version knows"], ["status"]])
def test_a_line_that_this_version_does_not_know_is_set_aside(shared_store: str, line: list[str]) -> None:
    first = tracking.start(TrackingConfig(uri=shared_store), "train")
    kept = [line, ["tags", {"after": "it"}]]
    (first.run_dir / "spool.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in kept))
    tracking.start(TrackingConfig(uri=shared_store), "train", resume=first.run_id)
    assert mlflow.MlflowClient(shared_store).get_run(first.run_id).data.tags["after"] == "it"
    assert not (first.run_dir / "spool.jsonl").exists()
    assert json.loads((first.run_dir / "refused.jsonl").read_text()) == line


def test_a_data_set_waits_and_is_one_however_often_it_is_sent(shared_store: str) -> None:
    config = TrackingConfig(uri=shared_store)
    first = tracking.start(config, "train")
    line = ["data", "mine.jsonl", "0" * 32, "/home/me/mine.jsonl", "training", 38]
    hub = ["data", "org/name", "1" * 32, "https://huggingface.co/datasets/org/name", "evaluation", 9]
    lines = [line, line, hub]  # as version 0.1 left them
    (first.run_dir / "spool.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in lines))
    tracker = tracking.start(config, "train", resume=first.run_id)
    place = {"uri": "/home/me/mine.jsonl"}
    tracker.data(DataSet("mine.jsonl", "0" * 32, "training", "local", place, {"num_rows": 38}))
    profile = {"num_rows": 9, "seed_start": 5000}
    tracker.data(DataSet("arithmetic eval", "1" * 8, "evaluation", "generated", {"task": "arithmetic"}, profile))
    tracker.finish("FINISHED")
    inputs = tracking.connect(shared_store).get_run(first.run_id).inputs.dataset_inputs
    found = {each.dataset.name: each for each in inputs}
    assert len(inputs) == 3
    own, from_hub, made = (found[name].dataset for name in ("mine.jsonl", "org/name", "arithmetic eval"))
    assert (own.source_type, json.loads(own.source)) == ("local", {"uri": "/home/me/mine.jsonl"})
    url = {"url": "https://huggingface.co/datasets/org/name"}
    assert (from_hub.source_type, json.loads(from_hub.source)) == ("http", url)
    assert (made.source_type, json.loads(made.source)) == ("generated", {"task": "arithmetic"})
    assert json.loads(own.profile) == {"num_rows": 38}
    assert json.loads(made.profile) == profile
    assert [tag.value for tag in found["org/name"].tags] == ["evaluation"]
