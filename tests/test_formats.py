"""What earlier versions wrote stays readable: runs go on, checkpoints load, rollouts train, studies continue.

`tests/formats/v1.zip` was written once (tests/support/make_formats.py) and is never made anew.
"""

from __future__ import annotations

import csv
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import optuna
import pytest
import yaml
from mlflow import db

from grpo_mlflow import tasks
from grpo_mlflow.cli import evaluate, merge, optimize, report, train
from grpo_mlflow.config import flatten, renamed, resolve
from grpo_mlflow.errors import UserError
from grpo_mlflow.tasks import contents
from tests.support import stored
from tests.support.fake_server import FakeServer
from tests.support.pages import Parsed
from tests.support.small_runs import SMALL

STORE = "tracking.uri=sqlite:///mlflow.db"
CLOSE = 2e-3  # CPUs round differently, and four optimizer steps carry that on
ROLLOUT = ("token_ids", "text", "behaviour_logprobs", "finish_reason", "policy_version", "verdict")


@dataclass(frozen=True)
class Stores:
    """The stores of a version in a folder of the test's own, which is the current one."""

    folder: Path
    figures: dict[str, Any]

    @property
    def client(self) -> mlflow.MlflowClient:
        return mlflow.MlflowClient(f"sqlite:///{self.folder}/mlflow.db")

    def id_of(self, name: str) -> str:
        return str(self.figures["runs"][name])

    def files(self, name: str) -> Path:
        """Return the files of a run."""
        return self.folder / "mlruns" / "grpo" / self.id_of(name) / "artifacts"

    def metrics(self, name: str, kind: str, iteration: int) -> dict[str, Any]:
        path = self.files(name) / f"metrics/{kind}_iter_{iteration:03d}.json"
        content: dict[str, Any] = json.loads(path.read_text())
        return content

    def curve(self, name: str, key: str) -> list[tuple[int, float]]:
        return [(p.step, p.value) for p in self.client.get_metric_history(self.id_of(name), key)]

    def runs(self) -> dict[str, str]:
        """Return the id of each run by its name."""
        experiment = self.client.get_experiment_by_name("grpo").experiment_id
        return {run.info.run_name: run.info.run_id for run in self.client.search_runs([experiment])}


@pytest.fixture(params=["v1"])
def stores(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stores:
    stored.unpack(stored.FORMATS / f"{request.param}.zip", tmp_path)
    db.upgrade.callback(f"sqlite:///{tmp_path}/mlflow.db")  # what a newer MLflow asks for: its schema is its own
    monkeypatch.chdir(tmp_path)
    return Stores(tmp_path, json.loads((stored.FORMATS / f"{request.param}.json").read_text()))


def kept(path: Path) -> list[dict[str, Any]]:
    """Return what a file of rollouts holds since version 1."""
    groups = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {
            **{key: group[key] for key in ("problem", "prompt_token_ids")},
            "advantages": [round(value, 6) for value in group["advantages"]],
            "rollouts": [{key: each[key] for key in ROLLOUT} for each in group["rollouts"]],
        }
        for group in groups
    ]


def test_a_run_goes_on_in_place_and_computes_what_it_did(stores: Stores) -> None:
    before = {key: stores.curve("trained", key) for key in ("train/loss_total", "eval/pass_at_1")}
    train.main([f"resume={stores.id_of('trained')}", STORE, "train.iterations=6"])
    for iteration, expected in zip((4, 5), stores.figures["resumed"], strict=True):
        found = stores.metrics("trained", "train", iteration)
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=CLOSE)
    assert stores.figures["resumed_pass_at_1"] == 0.25  # of 8 seeds, which name 5 problems
    assert stores.metrics("trained", "eval", 6)["pass@1"] == pytest.approx(0.35)  # of these
    after = {key: stores.curve("trained", key) for key in before}
    assert all(after[key][: len(curve)] == curve for key, curve in before.items())
    assert [step for step, _ in after["train/loss_total"]] == [0, 1, 2, 3, 4, 5]
    assert [step for step, _ in after["eval/pass_at_1"]] == [0, 2, 4, 6]
    run = stores.client.get_run(stores.id_of("trained"))
    assert (run.info.status, run.data.tags["grpo.last_checkpoint"]) == ("FINISHED", "iter_006")
    assert stores.runs().keys() == stores.figures["runs"].keys()  # no further run


def test_checkpoints_are_whole_and_one_that_is_not_is_refused(stores: Stores) -> None:
    names = ("trained", "adapter", "ahead", "trial-0")
    checkpoints = [path for name in names for path in sorted((stores.files(name) / "checkpoints").iterdir())]
    assert len(checkpoints) == 7
    for checkpoint in checkpoints:
        listed = json.loads((checkpoint / "manifest.json").read_text())["files"]
        there = {str(p.relative_to(checkpoint)): p.read_bytes() for p in checkpoint.rglob("*") if p.is_file()}
        del there["manifest.json"]
        assert listed == {
            name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in there.items()
        }
        evaluate.main(["--model", str(checkpoint), STORE, "--print-config"])  # reads the checkpoint, and no more
    weights = checkpoints[0] / "trainer" / "optimizer.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"optimizer\.safetensors differs from its manifest"):
        evaluate.main(["--model", str(checkpoints[0]), STORE, "--print-config"])


def test_kept_rollouts_are_read_and_trained_on(stores: Stores) -> None:
    old = stores.files("trained") / "rollouts"
    group = kept(old / "iter_000.jsonl")[0]
    assert (group["problem"]["id"], group["problem"]["payload"]) == ("arithmetic/train/102434", {"answer": 11})
    assert group["problem"]["messages"] == [{"role": "user", "content": "4+7=? Number only."}]
    assert group["prompt_token_ids"] == [2, 24, 15, 27, 283, 314, 311, 18, 1, 4]
    found = [(each["token_ids"], each["text"], each["verdict"]["reward"]) for each in group["rollouts"]]
    right, wrong = ([21, 21, 1], "11", 1.0), ([21, 20, 1], "10", 0.1)
    assert found == [right, right, wrong, right]
    assert group["advantages"] == pytest.approx([0.5, 0.5, -1.5, 0.5], rel=1e-3)  # (r - .775) / (.45 + 1e-4)
    words = ["--config", str(stores.files("trained") / "config/resolved.yaml"), "tracking.run_name=again"]
    train.main([*words, STORE, f"data.source=runs:/{stores.id_of('trained')}", "train.iterations=2"])
    again = stores.folder / "mlruns" / "grpo" / stores.runs()["again"] / "artifacts"
    for iteration in (0, 1):
        name = f"iter_00{iteration}.jsonl"
        assert kept(again / "rollouts" / name) == kept(old / name)
        now = json.loads((again / f"metrics/train_iter_00{iteration}.json").read_text())
        then = stores.metrics("trained", "train", iteration)
        assert now["reward_mean"] == then["reward_mean"]
        assert now["grad_norm"] == pytest.approx(then["grad_norm"], rel=CLOSE)  # the same rollouts, so the same updates


def of_different_problems(rates: list[float]) -> list[float]:
    """Return the rates at the first seed of each problem: version 1 counted a problem as often as seeds named it."""
    config = resolve("tiny", SMALL).config
    problems = [tasks.of(config).problem("eval", config.eval.id_seed_start + place) for place in range(len(rates))]
    first = {problem.seed for problem in contents.distinct(problems)}
    return [rate for problem, rate in zip(problems, rates, strict=True) if problem.seed in first]


@pytest.mark.parametrize(
    ("name", "model", "iteration"),
    [("trained", "{trained}", 4), ("adapter", "{adapter}", 2), ("trial-0", "models:/grpo@champion", 4)],
    ids=["best of a run", "best of an adapter", "champion of a study"],
)
def test_an_evaluation_finds_what_was_found_then(stores: Stores, name: str, model: str, iteration: int) -> None:
    model = model.format(**stores.figures["runs"])
    evaluate.main(["--model", model, STORE, "tracking.run_name=evaluated"])
    found = stores.client.get_run(stores.runs()["evaluated"]).data.metrics
    state = json.loads((stores.files(name) / f"checkpoints/iter_00{iteration}/trainer/state.json").read_text())
    rates = state["progress"]["last_rates"]
    assert sum(rates) / 8 == pytest.approx(dict(stores.curve(name, "eval/pass_at_1"))[iteration])
    different = of_different_problems(rates)
    assert found["eval/tasks"] == len(different)
    assert found["eval/pass_at_1"] == pytest.approx(sum(different) / len(different))
    assert found["eval/pass_at_4"] == pytest.approx(sum(rate > 0 for rate in different) / len(different))


def test_an_adapter_can_be_merged(stores: Stores) -> None:
    merge.main(["--model", stores.id_of("adapter"), "--output", "merged", STORE])
    settings = str(stores.files("adapter") / "config/resolved.yaml")
    evaluate.main(["--config", settings, "--model", "merged", "model.lora.rank=null", "tracking.run_name=evaluated"])
    found = stores.client.get_run(stores.runs()["evaluated"]).data.metrics["eval/pass_at_4"]
    state = json.loads((stores.files("adapter") / "checkpoints/iter_002/trainer/state.json").read_text())
    different = of_different_problems(state["progress"]["last_rates"])
    assert found == pytest.approx(sum(rate > 0 for rate in different) / len(different))


def test_what_was_sampled_ahead_is_trained_on(stores: Stores) -> None:
    checkpoint, path = stores.files("ahead") / "checkpoints/iter_002", stores.files("ahead") / "rollouts/iter_002.jsonl"
    then = stores.metrics("ahead", "train", 2)
    path.unlink()
    with FakeServer("vllm", stores.folder / "base") as server:
        train.main([f"resume={checkpoint}", STORE, f"generation.base_url={server.url}"])
    assert kept(path) == kept(checkpoint / "trainer/ahead.jsonl")
    now = stores.metrics("ahead", "train", 2)
    assert now["seconds_iteration"] != then["seconds_iteration"]
    assert now["grad_norm"] == pytest.approx(then["grad_norm"], rel=CLOSE)


def test_a_study_goes_on(stores: Stores) -> None:
    def trials() -> list[dict[str, Any]]:
        study = optuna.load_study(study_name="grpo", storage=f"sqlite:///{stores.folder}/optuna.db")
        found = study.get_trials()
        return [{"state": trial.state.name, "params": trial.params, "value": trial.value} for trial in found]

    before = trials()
    assert [trial["state"] for trial in before] == ["COMPLETE", "PRUNED", "COMPLETE"]
    resolved = str(stores.files("study") / "config/resolved.yaml")
    optimize.main(["--config", resolved, STORE, "--n_trials", "4"])
    assert trials()[:3] == before
    assert [trial["state"] for trial in trials()[3:]] in (["COMPLETE"], ["PRUNED"])
    rows = list(csv.DictReader((stores.files("study") / "study/trials.csv").read_text().splitlines()))
    assert [row["run_id"] for row in rows[:3]] == [stores.id_of(f"trial-{n}") for n in range(3)]
    (name,) = stores.runs().keys() - stores.figures["runs"].keys()
    assert name.startswith("trial 3 lr=")


@pytest.mark.parametrize("name", ["trained", "adapter", "trial-0"])
def test_a_run_that_left_no_report_gets_one(stores: Stores, name: str) -> None:
    report.main(["--run", stores.id_of(name), STORE])
    page = Parsed((stores.files(name) / "report.html").read_text())
    for label, key in (("pass@1", "eval/pass_at_1"), ("pass@4", "eval/pass_at_4")):
        mark = page.mark("share solved", label)
        assert list(zip(mark["x"], mark["y"], strict=True)) == stores.curve(name, key)
    mark = page.mark("reward", "total")
    assert list(zip(mark["x"], mark["y"], strict=True)) == stores.curve(name, "train/reward_mean")
    assert page.data["samples"] != []
    assert "cannot be said" not in page.said


def test_a_study_gets_a_report_of_today(stores: Stores) -> None:
    report.main(["--run", stores.id_of("study"), STORE])
    page = Parsed((stores.files("study") / "study/report.html").read_text())
    study = optuna.load_study(study_name="grpo", storage=f"sqlite:///{stores.folder}/optuna.db")
    ended = {"finished": "COMPLETE", "pruned": "PRUNED"}
    for label, state in ended.items():
        trials = [trial for trial in study.trials if trial.state.name == state]
        assert page.mark("pass@1", label)["x"] == [trial.number for trial in trials]
        assert page.mark("pass@1", label)["y"] == [trial.value for trial in trials]
    assert "3 trials: 2 finished, 1 pruned, 0 failed" in page.said


@pytest.mark.parametrize("name", ["trained", "adapter", "ahead", "study"])
def test_settings_mean_what_they_did(stores: Stores, name: str) -> None:
    path = stores.files(name) / "config" / "resolved.yaml"
    then, now = (
        renamed(flatten(yaml.safe_load(path.read_text()))),
        flatten(resolve(str(path)).config.model_dump(mode="json")),
    )
    assert {key: now[key] for key in then} == then
