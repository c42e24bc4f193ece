"""Kept checkpoints as models of MLflow: one each, with their figures, loaded by every address, weights stored once."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow.entities import LoggedModel

from grpo_mlflow import runs, tracking
from grpo_mlflow.config import Arguments, resolve
from grpo_mlflow.errors import ConfigError, UserError
from grpo_mlflow.generation import LocalGenerator, Sampling
from grpo_mlflow.model import policy
from grpo_mlflow.runs import stored
from grpo_mlflow.tasks import Arithmetic
from grpo_mlflow.tracking import models as tracking_models
from grpo_mlflow.tracking import registry
from grpo_mlflow.training.trainer import Trainer
from grpo_mlflow.types import Problem
from tests.support.mlflow_server import Server
from tests.support.signals import at_every_line
from tests.support.small_runs import curves, newest, resume, small

pytestmark = pytest.mark.filterwarnings("ignore:.*Any type hint is inferred")  # as MLflow says of its own classes
PROBLEMS = [Arithmetic(digits=1).problem("train", seed) for seed in range(8)]
TEXTS = [problem.messages[-1]["content"] for problem in PROBLEMS]
GREEDY = {"temperature": 0.0}
KNOWS = ("model.tiny.error_rate=0", "model.tiny.steps=250", "train.lr=1e-5")  # sums of single digits


@pytest.fixture(autouse=True)
def _loaders_apart() -> Iterator[None]:
    """MLflow puts the folder of the loader before all others, and Python keeps the module."""
    path = list(sys.path)
    yield
    sys.path[:] = path
    sys.modules.pop("grpo_pyfunc_loader", None)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    made.start()
    yield made
    made.stop()


def models(store: str, run_id: str) -> dict[str, LoggedModel]:
    """The models of a run, by the names of their checkpoints."""
    client = mlflow.MlflowClient(store)
    experiment = client.get_run(run_id).info.experiment_id
    found = client.search_logged_models([experiment], f"source_run_id = '{run_id}'")
    assert len({model.tags["grpo.checkpoint"] for model in found}) == len(found)  # none is there twice
    return {model.tags["grpo.checkpoint"]: model for model in found}


def expected(folder: Path, problems: list[Problem] = PROBLEMS) -> list[str]:
    """The likeliest answers by our own generator."""
    own = policy.load(folder, torch.device("cpu"))
    prompts = [own.prompt(problem) for problem in problems]
    found = LocalGenerator(own, 4).generate(prompts, 1, Sampling(8, temperature=0.0), 0, ("test",))
    return [row[0].text for row in found]


def loaded(uri: str) -> list[str]:
    answers: list[str] = mlflow.pyfunc.load_model(uri).predict(TEXTS, params=GREEDY)
    return answers


def by_transformers(uri: str) -> list[str]:
    pipeline = mlflow.transformers.load_model(uri)
    chats = [[{"role": "user", "content": text}] for text in TEXTS]
    found = [pipeline(chat, do_sample=False, max_new_tokens=8)[0] for chat in chats]
    return [each["generated_text"][-1]["content"] for each in found]


def test_the_checkpoints_that_a_run_keeps_load_by_every_address(store: str) -> None:
    found = runs.train(small(store, *KNOWS, "tracking.register=sums"))
    client, named = mlflow.MlflowClient(store), models(store, found.run_id)
    best = client.get_run(found.run_id).data.tags["grpo.best_checkpoint"]
    assert named.keys() == {best, "iter_004"}
    folder = found.run_dir / "checkpoints" / best
    right = expected(folder)
    own = Arithmetic(digits=1)
    assert all(own.verify(problem, text).success for problem, text in zip(PROBLEMS, right, strict=True))
    for uri in (
        f"runs:/{found.run_id}/checkpoints/{best}",
        f"models:/{named[best].model_id}",
        "models:/sums@champion",
        "models:/sums/1",
    ):
        assert loaded(uri) == right
        assert by_transformers(uri) == right


def test_a_model_has_the_figures_of_its_evaluation_and_the_data_set(store: str) -> None:
    found = runs.train(small(store, *KNOWS))
    client, run = mlflow.MlflowClient(store), mlflow.MlflowClient(store).get_run(found.run_id)
    data = {each.dataset.name: each.dataset for each in run.inputs.dataset_inputs}
    assert data.keys() == {"arithmetic train", "arithmetic eval"}
    for model in models(store, found.run_id).values():
        step = int(model.params["iteration"])
        history = {point.step: point.value for point in client.get_metric_history(found.run_id, "eval/pass_at_1")}
        [score] = [metric for metric in model.metrics if metric.key == "eval/pass_at_1"]
        assert (score.step, score.value) == (step, history[step])
        assert (score.dataset_name, score.dataset_digest) == ("arithmetic eval", data["arithmetic eval"].digest)
        assert {metric.key for metric in model.metrics} == {key for key in run.data.metrics if key.startswith("eval/")}
    outputs = {output.model_id: output.step for output in run.outputs.model_outputs}
    assert outputs == {m.model_id: int(m.params["iteration"]) for m in models(store, found.run_id).values()}
    for key, points in curves(store, found.run_id).items():  # what the models have are no second points of the run
        assert len({step for step, _ in points}) == len(points), key


def test_the_weights_are_stored_once(store: str) -> None:
    found = runs.train(small(store))
    for name, model in models(store, found.run_id).items():
        folder = Path(model.artifact_location)
        assert (folder / "model.safetensors").samefile(found.run_dir / "checkpoints" / name / "model.safetensors")
        assert not (folder / "trainer").exists()
        assert f"model_id: {model.model_id}\n" in (folder / "MLmodel").read_text()


def test_going_on_doubles_no_model_and_hides_those_of_deleted_checkpoints(store: str) -> None:
    found = runs.train(small(store, "checkpoint.keep_last=1"))
    before = models(store, found.run_id)
    resume(store, found.run_id)  # nothing is left to do
    assert {n: m.model_id for n, m in models(store, found.run_id).items()} == {n: m.model_id for n, m in before.items()}
    resume(store, found.run_id, "train.iterations=6", "eval.enabled=true")
    client = mlflow.MlflowClient(store)
    tags = client.get_run(found.run_id).data.tags
    after = models(store, found.run_id)
    assert after.keys() == {tags["grpo.best_checkpoint"], "iter_006"}
    for name, model in before.items():  # the links of a hidden one would keep its weights on the disk
        assert Path(model.artifact_location).exists() == (name in after)
    folder = found.run_dir / "checkpoints" / "iter_006"
    assert (folder / "model.safetensors").stat().st_nlink == 2
    for key, points in curves(store, found.run_id).items():
        assert len({step for step, _ in points}) == len(points), key


def test_a_resume_that_fails_leaves_no_model_of_a_checkpoint_that_it_has_deleted(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = runs.train(small(store, "eval.enabled=false", "checkpoint.keep_last=1"))
    assert models(store, found.run_id).keys() == {"iter_004"}

    class Breaks(Trainer):
        def iterate(self, version: int) -> None:
            if version == 5:
                raise SystemExit("as asked")
            super().iterate(version)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(import_module("grpo_mlflow.runs.train"), "Trainer", Breaks)
        resume(store, found.run_id, "train.iterations=6")
    assert models(store, found.run_id) == {}
    resume(store, found.run_id)
    assert models(store, found.run_id).keys() == {"iter_006"}


def test_a_damaged_file_of_figures_does_not_fail_a_run_that_has_ended(
    store: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = runs.train(small(store, "train.iterations=2", "train.lr_warmup_steps=0"))
    file = found.run_dir / "metrics" / "eval_iter_002.json"
    file.write_text(file.read_text()[:20])  # cut off
    resume(store, found.run_id)
    assert mlflow.MlflowClient(store).get_run(found.run_id).info.status == "FINISHED"
    assert "eval_iter_002.json cannot be read" in caplog.text
    assert "iter_002" in models(store, found.run_id)


def test_a_checkpoint_that_cannot_be_held_does_not_fail_a_run_that_has_ended(
    store: str, caplog: pytest.LogCaptureFixture
) -> None:
    words = ("eval.enabled=false", "train.iterations=2", "train.lr_warmup_steps=0")
    found = runs.train(small(store, *words))
    (found.run_dir / "checkpoints" / "iter_002" / "registered").mkdir()  # so it cannot be written, as on a full disk
    resume(store, found.run_id, "tracking.register=sums")
    assert mlflow.MlflowClient(store).get_run(found.run_id).info.status == "FINISHED"
    assert "not all checkpoints that are kept became models of MLflow" in caplog.text


def test_a_model_whose_links_a_kill_has_cut_short_is_made_whole(tmp_path: Path) -> None:
    source, moments = tmp_path / "iter_001", 0
    for name in ("MLmodel", "model.safetensors", "code/loader.py", "trainer/optimizer.safetensors"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("model_id: null\n")

    def reached() -> None:  # what a process that is killed here leaves
        nonlocal moments
        moments += 1
        if (tmp_path / "target").exists():
            shutil.copytree(tmp_path / "target", tmp_path / "left" / str(moments))

    with at_every_line(reached):
        tracking_models._link(source, tmp_path / "target", "m-1")
    for left in (tmp_path / "left").iterdir():
        if (left / "MLmodel").exists():
            assert (left / "MLmodel").read_text() == "model_id: m-1\n"
            assert {"model.safetensors", "code", "MLmodel"} <= {path.name for path in left.iterdir()}
        tracking_models._link(source, left, "m-1")
        assert (left / "MLmodel").read_text() == "model_id: m-1\n"


def test_only_one_model_of_a_run_is_the_last(store: str) -> None:
    found = runs.train(small(store, "eval.enabled=false", "checkpoint.keep_last=9"))
    assert models(store, found.run_id)["iter_004"].tags["grpo.kept"] == "last"
    resume(store, found.run_id, "train.iterations=6")
    kept = {name: model.tags.get("grpo.kept") for name, model in models(store, found.run_id).items()}
    assert kept == {"iter_004": None, "iter_006": "last"}


def test_what_people_write_on_the_page_of_a_model_stays(store: str) -> None:
    found = runs.train(small(store, "tracking.register=sums"))
    model, client = models(store, found.run_id)["iter_004"], mlflow.MlflowClient(store)
    assert f"mlflow models serve -m runs:/{found.run_id}/checkpoints/iter_004" in model.tags["mlflow.note.content"]
    client.set_logged_model_tags(model.model_id, {"mlflow.note.content": "for the demo"})
    resume(store, found.run_id)
    assert models(store, found.run_id)["iter_004"].tags["mlflow.note.content"] == "for the demo"


def test_a_registered_checkpoint_stays(store: str) -> None:
    found = runs.train(small(store, "eval.enabled=false", "checkpoint.keep_last=1", "tracking.register=sums"))
    right = expected(found.run_dir / "checkpoints" / "iter_004")
    resume(store, found.run_id, "train.iterations=6")
    kept = {path.name for path in (found.run_dir / "checkpoints").iterdir()}
    assert kept == {"iter_004", "iter_006"}
    assert (loaded("models:/sums/1"), loaded("models:/sums@champion")) == (
        right,
        expected(found.run_dir / "checkpoints" / "iter_006"),
    )
    named = models(store, found.run_id)
    versions = {name: json.loads(model.tags["mlflow.modelVersions"]) for name, model in named.items()}
    assert versions == {"iter_004": [{"name": "sums", "version": 1}], "iter_006": [{"name": "sums", "version": 2}]}


def test_a_resume_that_would_replace_a_registered_checkpoint_is_refused(store: str) -> None:
    found = runs.train(small(store, "eval.enabled=false", "checkpoint.keep_last=9", "tracking.register=sums"))
    folder = found.run_dir / "checkpoints"
    right = expected(folder / "iter_004")
    with pytest.raises(
        UserError, match=r"iter_002: iter_004 in .* is registered .*allowed: .*model\.train_id="
    ) as caught:
        resume(store, str(folder / "iter_002"), "train.iterations=3")
    assert "\n" not in str(caught.value)
    assert {"iter_003", "iter_004"} <= {path.name for path in folder.iterdir()}
    assert loaded("models:/sums/1") == right
    assert mlflow.MlflowClient(store).get_run(found.run_id).info.status == "FINISHED"


def test_other_weights_at_the_place_of_a_version_are_another_version(store: str) -> None:
    found = runs.train(small(store, "eval.enabled=false", "tracking.register=sums"))
    client = mlflow.MlflowClient(store)
    [first] = client.search_model_versions("name = 'sums'")
    assert first.tags["grpo.weights"] == models(store, found.run_id)["iter_004"].tags["grpo.weights"]
    for weights in ("others", "others"):
        registry.register(
            client, "sums", "champion", found.run_id, "checkpoints/iter_004", {registry.WEIGHTS_TAG: weights}
        )
    by_weights = {version.tags["grpo.weights"]: version.version for version in client.search_model_versions()}
    assert by_weights == {first.tags["grpo.weights"]: first.version, "others": 2}
    assert str(client.get_model_version_by_alias("sums", "champion").version) == "2"


def test_another_branch_of_a_run_has_models_of_its_own(store: str) -> None:
    found = runs.train(small(store, "eval.enabled=false", "checkpoint.keep_last=9"))
    old = models(store, found.run_id)["iter_004"]
    again = resume(store, str(found.run_dir / "checkpoints" / "iter_002"), "train.iterations=3")
    assert again.run_id == found.run_id
    resume(store, found.run_id, "train.iterations=4")  # with the schedule of 3, so its weights are others
    new = models(store, found.run_id)["iter_004"]
    assert new.model_id != old.model_id
    assert not Path(old.artifact_location).exists()
    assert expected(Path(new.artifact_location)) == expected(found.run_dir / "checkpoints" / "iter_004")


def test_runs_that_register_leave_each_other_their_versions(store: str) -> None:
    first, second = (runs.train(small(store, "tracking.register=my sums", f"seed={seed}")) for seed in (0, 1))
    client = mlflow.MlflowClient(store)
    assert client.get_model_version_by_alias("my sums", "champion").run_id == second.run_id
    assert client.get_model_version_by_alias("my sums", f"champion-{first.run_id[:8]}").run_id == first.run_id
    tags = client.get_run(second.run_id).data.tags
    version = client.get_model_version_by_alias("my sums", "champion")
    assert version.source.endswith(f"/checkpoints/{tags['grpo.best_checkpoint']}")
    _, folder = stored.resolve_evaluation(
        Arguments("", (f"tracking.uri={store}",), False, {}), "models:/my sums@champion", "best"
    )
    assert Path(folder).name == tags["grpo.best_checkpoint"]


@pytest.mark.parametrize("name", ["a/b", "a:b", "", ".", "a'b"])
def test_a_name_that_the_registry_does_not_take_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.register"):
        resolve("tiny", [f"tracking.register={json.dumps(name)}"])


def test_an_evaluation_stands_with_the_model_of_its_checkpoint(store: str, tmp_path: Path) -> None:
    found = runs.train(small(store))
    more = Arguments("", (f"tracking.uri={store}", "eval.num_ids=16", "eval.id_seed_start=9000"), False, {})
    resolved, folder = stored.resolve_evaluation(more, found.run_id, "last")
    shutil.copytree(folder, tmp_path / "downloaded")
    runs.evaluate(resolved, tmp_path / "downloaded")  # whatever its name
    model = models(store, found.run_id)["iter_004"]
    client = mlflow.MlflowClient(store)
    [other] = {metric.run_id for metric in model.metrics} - {found.run_id}
    run = client.get_run(other)
    assert [each.model_id for each in run.inputs.model_inputs] == [model.model_id]
    [data] = run.inputs.dataset_inputs  # it trains on none
    assert (data.dataset.name, data.tags[0].value) == ("arithmetic eval", "evaluation")
    scores = {metric.run_id: metric for metric in model.metrics if metric.key == "eval/pass_at_1"}
    assert scores[other].value == run.data.metrics["eval/pass_at_1"]
    assert scores[other].dataset_digest == data.dataset.digest != scores[found.run_id].dataset_digest
    assert len(client.get_metric_history(other, "eval/pass_at_1")) == 1


def test_an_evaluation_of_a_checkpoint_that_is_no_model_is_an_evaluation(store: str) -> None:
    found = runs.train(small(store))
    resolved, folder = stored.resolve_evaluation(
        Arguments("", (f"tracking.uri={store}",), False, {}), found.run_id, "iter_003"
    )
    assert models(store, found.run_id).keys() & {"iter_003"} == set()
    runs.evaluate(resolved, folder)
    assert list((found.run_dir.parent.parent).rglob("refused.jsonl")) == []


def test_an_evaluation_of_a_checkpoint_of_another_store_ends(store: str, tmp_path: Path) -> None:
    found = runs.train(small(store))
    other = f"sqlite:///{tmp_path / 'other.db'}"
    folder = found.run_dir / "checkpoints" / "iter_004"
    runs.evaluate(small(other), folder)
    run = mlflow.MlflowClient(other).get_run(newest(other))
    assert (run.info.status, run.data.tags["grpo.evaluated_run"]) == ("FINISHED", found.run_id)
    assert list(found.run_dir.parent.parent.rglob("spool.jsonl")) == []


def lines(store: str, run_id: str) -> list[dict[str, Any]]:
    """What a run would keep in its spool for its models, from what they are."""
    return [
        {
            "checkpoint": name,
            "name": model.name,
            "weights": model.tags["grpo.weights"],
            "step": int(model.params["iteration"]),
            "params": model.params,
            "tags": {"grpo.kept": model.tags["grpo.kept"]},
            "metrics": {metric.key: metric.value for metric in model.metrics},
        }
        for name, model in models(store, run_id).items()
    ]


def test_a_killed_sender_leaves_one_model_however_far_it_was(store: str) -> None:
    """What was being sent is sent again by a resume or `upload`, from the beginning."""
    found = runs.train(small(store))
    client, kept = mlflow.MlflowClient(store), lines(store, found.run_id)
    before = models(store, found.run_id)
    line = json.dumps(["models", found.run_id, kept]) + "\n"
    (found.run_dir / "spool.jsonl").write_text(line * 2)
    assert tracking.send_kept(store, found.run_id) == tracking.Upload(found.run_id, 2, 0)
    assert {m.model_id for m in models(store, found.run_id).values()} == {m.model_id for m in before.values()}
    # killed right after the model was made: it is pending, and has neither files nor figures
    for model in before.values():
        client.delete_logged_model(model.model_id)
    experiment = client.get_run(found.run_id).info.experiment_id
    tags = {"grpo.checkpoint": "iter_004", "grpo.weights": before["iter_004"].tags["grpo.weights"]}
    half = client.create_logged_model(experiment, "half", found.run_id, tags)
    (found.run_dir / "spool.jsonl").write_text(line)
    assert tracking.send_kept(store, found.run_id) == tracking.Upload(found.run_id, 1, 0)
    after = models(store, found.run_id)
    assert after.keys() == before.keys()
    assert after["iter_004"].model_id == half.model_id
    assert {str(model.status) for model in after.values()} == {str(before["iter_004"].status)}
    assert expected(Path(after["iter_004"].artifact_location)) == expected(found.run_dir / "checkpoints" / "iter_004")
    assert not (found.run_dir / "refused.jsonl").exists()


def test_a_checkpoint_that_is_deleted_before_it_is_sent_becomes_no_model(store: str) -> None:
    found = runs.train(small(store))
    client, kept = mlflow.MlflowClient(store), lines(store, found.run_id)
    for model in models(store, found.run_id).values():
        client.delete_logged_model(model.model_id)
    gone = {**kept[0], "checkpoint": "iter_999"}
    (found.run_dir / "spool.jsonl").write_text(json.dumps(["models", found.run_id, [gone, kept[0]]]) + "\n")
    assert tracking.send_kept(store, found.run_id) == tracking.Upload(found.run_id, 1, 0)
    assert models(store, found.run_id).keys() == {kept[0]["checkpoint"]}


def test_on_a_server_a_model_names_its_artifact_and_loads_by_alias(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = runs.train(small(server.uri, *KNOWS, "tracking.register=sums"))
    best = mlflow.MlflowClient(server.uri).get_run(found.run_id).data.tags["grpo.best_checkpoint"]
    model = models(server.uri, found.run_id)[best]
    assert model.tags["grpo.artifact"] == f"runs:/{found.run_id}/checkpoints/{best}"
    weights = [path for path in (tmp_path / "artifacts").rglob("model.safetensors") if best in path.parts]
    assert len(weights) == 1  # no second upload
    assert "eval/pass_at_1" in {metric.key for metric in model.metrics}
    right = expected(found.run_dir / "checkpoints" / best)
    mlflow.set_tracking_uri(server.uri)
    for uri in ("models:/sums@champion", model.tags["grpo.artifact"]):
        assert loaded(uri) == by_transformers(uri) == right
    resume(server.uri, found.run_id, "train.iterations=6")
    assert len(models(server.uri, found.run_id)) == len(
        {"iter_006", best, mlflow.MlflowClient(server.uri).get_run(found.run_id).data.tags["grpo.best_checkpoint"]}
    )
    assert loaded("models:/sums/1") == right


@pytest.mark.slow
@pytest.mark.parametrize("remote", [False, True], ids=["sqlite", "server"])
def test_mlflow_serves_a_registered_model(remote: bool, store: str, tmp_path: Path, request: Any) -> None:
    store = request.getfixturevalue("server").uri if remote else store
    found = runs.train(small(store, *KNOWS, "tracking.register=sums"))
    best = mlflow.MlflowClient(store).get_run(found.run_id).data.tags["grpo.best_checkpoint"]
    right = expected(found.run_dir / "checkpoints" / best)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/sums@champion"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "serve.log").open("wb") as log:
        environment = {**os.environ, "MLFLOW_TRACKING_URI": store}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        _until_it_answers(port, tmp_path / "serve.log")
        messages = [{"role": "user", "content": TEXTS[0]}]
        for body in (
            {"inputs": TEXTS, "params": GREEDY},
            {"dataframe_records": [{"prompt": text} for text in TEXTS], "params": GREEDY},
        ):
            assert _asked(port, body) == right
        for single in ({"prompt": TEXTS[0], **GREEDY}, {"messages": messages, **GREEDY}):
            assert _asked(port, single) == right[:1]
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def _until_it_answers(port: int, log: Path) -> None:
    for _ in range(1800):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(log.read_text())


def _asked(port: int, body: dict[str, Any]) -> list[str]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        found = json.loads(answer.read())
    predictions: list[str] = found["predictions"] if isinstance(found, dict) else found
    return predictions
