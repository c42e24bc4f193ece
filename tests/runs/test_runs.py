"""Whole runs: what they leave in MLflow, and that stopping and resuming changes nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import mlflow
import pytest
import torch

from grpo_mlflow import runs, tracking
from grpo_mlflow.config import dump, parse_arguments, resolve
from grpo_mlflow.errors import ConfigError, StoreAway, UserError
from grpo_mlflow.runs import stored
from grpo_mlflow.training.rollout_files import read
from tests.support.paths import ROOT
from tests.support.small_runs import SMALL, curves, newest, resume, same, small, until, weights


def test_a_run_leaves_everything_in_mlflow(store: str) -> None:
    resolved = small(store)
    finished = runs.train(resolved)
    client = mlflow.MlflowClient(store)
    run = client.get_run(finished.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["train.lr_schedule"] == "cosine"
    assert run.data.params["model.tiny.hidden_size"] == "32"
    shown = {key for key in resolved.origins if not key.startswith(("resume", "search."))}
    assert run.data.params.keys() == shown | {"train.log10_lr"}
    assert run.data.tags["version.torch"] == torch.__version__
    found = curves(store, finished.run_id)
    assert [step for step, _ in found["train/loss_total"]] == [0, 1, 2, 3]
    assert [step for step, _ in found["eval/pass_at_1"]] == [0, 2, 4]
    files = {str(p.relative_to(finished.run_dir)) for p in finished.run_dir.rglob("*") if p.is_file()}
    assert {f"metrics/train_iter_00{i}.json" for i in range(4)} <= files
    assert {f"metrics/eval_iter_00{i}.json" for i in (0, 2, 4)} <= files
    assert {f"samples/eval_iter_00{i}.json" for i in (0, 2, 4)} <= files
    train = json.loads((finished.run_dir / "metrics/train_iter_003.json").read_text())
    guide = ("loss_total", "loss_pg", "loss_kl", "loss_entropy", "kl_divergence", "reward_mean", "grad_norm")
    assert all(isinstance(train[name], float) for name in guide)
    assert train["loss_total"] == dict(found["train/loss_total"])[3]
    evaluation = json.loads((finished.run_dir / "metrics/eval_iter_004.json").read_text())
    assert evaluation["pass@1_low"] <= evaluation["pass@1"] <= evaluation["pass@4"]
    assert evaluation["pass@1"] == dict(found["eval/pass_at_1"])[4]
    groups = read(finished.run_dir / "rollouts/iter_002.jsonl")
    assert [len(group.rollouts) for group in groups] == [4] * 4
    assert {r.completion.policy_version for group in groups for r in group.rollouts} == {2}
    again = resolve(str(finished.run_dir / "config/resolved.yaml"))
    assert again.config == resolved.config


def test_the_same_config_gives_the_same_run(store: str) -> None:
    one = runs.train(small(store))
    same(one, runs.train(small(store)), store)
    other = runs.train(small(store, "seed=1"))
    assert curves(store, one.run_id)["train/reward_mean"] != curves(store, other.run_id)["train/reward_mean"]


def test_two_and_resume_and_two_equal_four(store: str) -> None:
    whole = runs.train(small(store))
    with pytest.raises(SystemExit):
        _train_until(store, 2)
    stopped = newest(store)
    client = mlflow.MlflowClient(store)
    assert client.get_run(stopped).info.status == "FAILED"
    continued = resume(store, stopped)
    assert continued.run_id == stopped
    assert client.get_run(stopped).info.status == "FINISHED"
    same(whole, continued, store)
    assert continued.progress.first_rates == whole.progress.first_rates


def _train_until(store: str, iteration: int) -> None:
    """Train with a task that breaks in the given iteration."""
    from grpo_mlflow.training.trainer import Trainer

    class Breaks(Trainer):
        def iterate(self, version: int) -> None:
            if version == iteration:
                raise SystemExit("as asked")
            super().iterate(version)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("grpo_mlflow.runs.train"), "Trainer", Breaks)
        runs.train(small(store))


def test_a_checkpoint_folder_can_be_resumed_and_a_finished_run_extended(store: str) -> None:
    longer = small(store, "train.iterations=5", "train.lr_schedule=constant")
    whole = runs.train(longer)
    short = runs.train(small(store, "train.lr_schedule=constant"))
    folder = short.run_dir / "checkpoints" / "iter_004"
    extended = resume(store, str(folder), "train.iterations=5")
    assert extended.run_id == short.run_id
    first, second = weights(whole, 5), weights(extended, 5)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_command_of_a_run_goes_on_with_resume_added(store: str) -> None:
    first = runs.train(small(store, "train.iterations=2", "train.lr_warmup_steps=0"))
    repeated = resume(store, first.run_id, *SMALL, "train.iterations=3", "train.lr_warmup_steps=0")
    assert (repeated.run_id, repeated.progress.iteration) == (first.run_id, 3)
    with pytest.raises(ConfigError, match=r"train\.lr_warmup_steps = 1 .*the run has 0, which cannot change on resume"):
        resume(store, first.run_id, "train.lr_warmup_steps=1")


def test_a_resume_from_an_older_checkpoint_keeps_the_new_branch(store: str) -> None:
    whole = runs.train(small(store, "train.iterations=3"))
    old = runs.train(small(store))
    folder = old.run_dir / "checkpoints"
    again = resume(store, str(folder / "iter_002"), "train.iterations=3", "checkpoint.keep_last=1")
    names = {path.name for path in folder.iterdir()}
    assert {"iter_003", "abandoned-iter_004", "abandoned-iter_003"} <= names
    assert "iter_004" not in names
    tags = mlflow.MlflowClient(store).get_run(again.run_id).data.tags
    assert (tags["grpo.last_checkpoint"], tags["grpo.ended"]) == ("iter_003", "FINISHED")
    assert tags["grpo.resumed_with"] == f"train.iterations=3 checkpoint.keep_last=1 tracking.uri={store}"
    assert whole.progress.iteration == again.progress.iteration == 3


def test_no_secret_is_left_anywhere(store: str) -> None:
    finished = runs.train(small(store, "generation.base_url=http://me:hunter2@host:1"))
    files = [path for path in finished.run_dir.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert not [path for path in files if b"hunter2" in path.read_bytes()]
    run = mlflow.MlflowClient(store).get_run(finished.run_id)
    assert "hunter2" not in str(run.data.params) + str(run.data.tags)


def test_the_batch_size_of_an_evaluation_changes_nothing(store: str) -> None:
    same(runs.train(small(store)), runs.train(small(store, "eval.batch_size=3")), store)


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(store: str) -> None:
    whole = runs.train(small(store))
    copy = runs.train(small(store))
    model = copy.run_dir / "checkpoints/iter_004/model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    same(whole, resume(store, copy.run_id), store)


def test_a_run_that_is_not_there_cannot_be_resumed(store: str) -> None:
    tracking.connect(store).create_experiment("grpo")
    arguments = parse_arguments(["resume=" + "0" * 32, f"tracking.uri={store}"], "train", "")
    with pytest.raises(UserError, match=f"run {'0' * 32}: is not in the MLflow store {store};"):
        stored.resolve_training(arguments, "0" * 32)


def test_only_a_training_run_can_be_resumed(shared_store: str) -> None:
    resolved = small(shared_store)
    trained = runs.train(resolved)
    runs.evaluate(resolved, trained.run_dir / "checkpoints" / "iter_004")
    evaluated = newest(shared_store)
    study = tracking.start(resolved.config.tracking, "optimize")
    study.text("config/resolved.yaml", dump(resolved.config))
    client = mlflow.MlflowClient(shared_store)
    for run_id, kind, instead in ((evaluated, "evaluate", "evaluate,"), (study.run_id, "optimize", "same optimize")):
        with pytest.raises(UserError, match=f"is a run of {kind}, not of train; allowed: .*{instead}"):
            resume(shared_store, f"runs:/{run_id}")
        assert client.get_run(run_id).data.tags["grpo.kind"] == kind
    client.delete_tag(trained.run_id, "grpo.kind")  # as after a death before it was written
    assert resume(shared_store, trained.run_id).progress.iteration == 4


def test_what_a_study_waits_for_keeps_its_kind_on_a_full_disk(shared_store: str) -> None:
    with pytest.raises(StoreAway, match=r"^search"), runs.session(small(shared_store), "train"):
        raise StoreAway("search.storage = 'journal:log': No space left on device")


def test_a_full_disk_is_told_in_one_line(shared_store: str, capsys: pytest.CaptureFixture[str]) -> None:
    with (
        pytest.raises(UserError, match=r"the disk is full: .*No space") as caught,
        runs.session(small(shared_store), "train"),
    ):
        Path("/dev/full").write_text("weights")
    assert "\n" not in str(caught.value)
    assert mlflow.MlflowClient(shared_store).get_run(newest(shared_store)).info.status == "FAILED"
    assert "training failed before its first checkpoint" in capsys.readouterr().out


def test_kept_rollouts_can_be_trained_on_again(store: str) -> None:
    live = runs.train(small(store))
    again = runs.train(small(store, f"data.source=runs:/{live.run_id}"))
    same(live, again, store)  # the same rollouts, so the same run
    gentler = runs.train(small(store, f"data.source=runs:/{live.run_id}", "train.lr=1e-5"))
    curve = curves(store, gentler.run_id)
    assert curve["train/reward_mean"] == curves(store, live.run_id)["train/reward_mean"]
    ratios = dict(curves(store, live.run_id)["train/sampler_ratio_mean"])
    assert dict(curve["train/sampler_ratio_mean"])[3] != ratios[3]
    with pytest.raises(UserError, match=r"data\.source = .* kept 4 iterations, .*; allowed: train\.iterations of 4 or"):
        runs.train(small(store, f"data.source=runs:/{live.run_id}", "train.iterations=5"))
    with pytest.raises(UserError, match="holds 16 rollouts"):
        runs.train(small(store, f"data.source=runs:/{live.run_id}", "data.problems_per_iteration=2"))
    with pytest.raises(UserError, match=f"data\\.source = .*{'0' * 32}: is not in the MLflow store {store};"):
        runs.train(small(store, f"data.source=runs:/{'0' * 32}"))
    assert newest(store) == gentler.run_id  # nothing was opened for what could only fail


def test_system_metrics_are_logged_where_asked_for(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    finished = runs.train(small(store, "tracking.system_metrics=true"))
    assert "system/cpu_utilization_percentage" in curves(store, finished.run_id)


def test_evaluate_takes_a_run_a_checkpoint_and_a_folder(store: str) -> None:
    finished = runs.train(small(store))
    client = mlflow.MlflowClient(store)
    found = curves(store, finished.run_id)["eval/pass_at_1"]
    best = max(value for step, value in found if step > 0)  # the model before training has no checkpoint
    folder = finished.run_dir / "checkpoints"
    for model, checkpoint, expected in [
        (finished.run_id, "best", best),
        (f"runs:/{finished.run_id}", "last", found[-1][1]),
        (finished.run_id, "iter_004", found[-1][1]),
        (str(folder / "iter_004"), "best", found[-1][1]),
    ]:
        words = ["--model", model, "--checkpoint", checkpoint, f"tracking.uri={store}"]
        arguments = parse_arguments(words, "evaluate", "", {"model": ("", ""), "checkpoint": ("", "")})
        resolved, source = stored.resolve_evaluation(arguments, model, checkpoint)
        result = runs.evaluate(resolved, source)
        assert result.pass_at(1).value == expected, (model, checkpoint)
    run = client.get_run(newest(store))
    assert (run.info.status, run.data.tags["grpo.kind"]) == ("FINISHED", "evaluate")
    assert run.data.metrics["eval/pass_at_1"] == found[-1][1]
    arguments = parse_arguments([f"tracking.uri={store}"], "evaluate", "")
    with pytest.raises(UserError, match="iter_777"):
        stored.resolve_evaluation(arguments, finished.run_id, "iter_777")


def _command(store: str, overrides: Sequence[str] = SMALL) -> list[str]:
    return [sys.executable, "-m", "grpo_mlflow", "train", *overrides, f"tracking.uri={store}"]


@pytest.mark.usefixtures("_terminal")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_killed_resumes_to_the_same_end(store: str, how: signal.Signals, tmp_path: Path) -> None:
    whole = runs.train(small(store))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        _command(store), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=tmp_path
    )
    until(process, "iter    2")
    time.sleep(0.02)
    if how == signal.SIGHUP:  # a terminal that closes, and nobody reads any more
        assert process.stdout is not None
        process.stdout.close()
    process.send_signal(how)
    rest = process.communicate(timeout=60)[0] if how != signal.SIGHUP else str(process.wait(60))
    stopped = newest(store)
    status = mlflow.MlflowClient(store).get_run(stopped).info.status
    if how == signal.SIGKILL:
        assert (process.returncode, status) == (-9, "RUNNING")
    else:
        assert (process.returncode, status) == (128 + how, "KILLED")
        assert how == signal.SIGHUP or f"grpo train resume={stopped}" in rest
        assert "Traceback" not in rest
    same(whole, resume(store, stopped), store)


@pytest.mark.slow
def test_mlflow_run_equals_python_dash_m(store: str, tmp_path: Path) -> None:
    """Every way to pass a setting, through the real `mlflow run`, gives the same config and the same metrics."""
    tiny_run = [item for item in SMALL if not item.startswith(("train.iterations", "eval.interval"))]
    given = f"train.iterations=3 eval.interval=1 {' '.join(tiny_run)}"
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "MLFLOW_TRACKING_URI": store,
    }
    through = [sys.executable, "-m", "mlflow", "run", str(ROOT), "-e", "train", "--env-manager=local"]
    through += ["--experiment-name", "grpo", "-P", "train.lr=3e-4", "-P", f"overrides={given}"]
    subprocess.run(through, check=True, env=environment, cwd=tmp_path)
    direct = [sys.executable, "-m", "grpo_mlflow", "train", "train.lr=3e-4", *given.split()]
    subprocess.run(direct, check=True, env=environment, cwd=tmp_path)
    client = mlflow.MlflowClient(store)
    experiments = [client.get_experiment_by_name("grpo").experiment_id]
    two, one = client.search_runs(experiments)
    assert [run.info.status for run in (one, two)] == ["FINISHED", "FINISHED"]
    configs = [tracking.artifact(client, run.info.run_id, "config/resolved.yaml").read_text() for run in (one, two)]
    assert configs[0] == configs[1]
    assert "lr: 0.0003" in configs[0]
    assert curves(store, one.info.run_id) == curves(store, two.info.run_id)
    assert [step for step, _ in curves(store, one.info.run_id)["eval/pass_at_1"]] == [0, 1, 2, 3]

    again = [*through[:-4], "-P", f"resume={one.info.run_id}", "-P", "train.iterations=4"]
    subprocess.run(again, check=True, env=environment, cwd=tmp_path)
    assert [step for step, _ in curves(store, one.info.run_id)["eval/pass_at_1"]] == [0, 1, 2, 3, 4]
    wrapper = client.search_runs(experiments)[0]
    assert wrapper.data.tags["mlflow.parentRunId"] == one.info.run_id  # `mlflow run` opens a run, come what may
