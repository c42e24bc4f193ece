"""Saved views: MLflow has each once, with the state that was written, and in the form that its UI reads."""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

import mlflow

from grpo_mlflow import tracking
from grpo_mlflow.config.schema import TrackingConfig
from grpo_mlflow.runs.views import OF_KIND, TRAINING
from grpo_mlflow.search.views import of_study
from grpo_mlflow.tracking import pages, views


def state_in(value: str) -> Any:
    """Return what the UI reads out of a tag."""
    kind, _, packed = json.loads(value)["state"].partition(";")
    assert kind == "deflate"
    return json.loads(zlib.decompress(base64.b64decode(packed)))


def tags(store: str) -> dict[str, str]:
    found: dict[str, str] = mlflow.MlflowClient(store).get_experiment_by_name("grpo").tags
    return {key: value for key, value in found.items() if key.startswith(views.PREFIX)}


def test_an_experiment_has_each_view_once(store: str) -> None:
    seen = []
    for _ in range(2):
        tracker = tracking.start(TrackingConfig(uri=store), "train")
        tracker.view(TRAINING)
        tracker.finish("FINISHED")
        seen.append(tags(store))
    assert seen[0] == seen[1]  # also when it was written
    assert list(seen[0]) == [f"{views.PREFIX}{TRAINING.key}"]
    state = state_in(seen[0][f"{views.PREFIX}{TRAINING.key}"])
    assert state["searchFilter"] == "tags.`grpo.kind` = 'train' and tags.`optuna.study` IS NULL"
    assert state["selectedColumns"][1] == "metrics.`eval/pass_at_1`"


def test_a_view_that_is_another_one_now_replaces_what_was_there() -> None:
    key, state = TRAINING.tag()
    first = views.packed("a", state, None)
    assert first is not None
    assert views.packed("a", state, first) is None
    again = views.packed("a", state.replace("train", "evaluate"), first)
    assert again is not None
    assert json.loads(again)["createdAt"] == json.loads(first)["createdAt"]
    assert views.packed("a", state, "somebody's own") is not None
    assert key == "mlflow.sharedViewState.grpo-training"


def test_every_chart_stands_in_a_section_and_has_a_name_of_its_own() -> None:
    varied = ["train.lr", "train.kl_coef"]
    for view in (*(view for kind in OF_KIND.values() for view in kind), of_study("my study", "0" * 32, varied, 4)):
        state = json.loads(view.tag()[1])
        charts, sections = state["compareRunCharts"], {section["uuid"] for section in state["compareRunSections"]}
        assert {chart["metricSectionId"] for chart in charts} == sections
        assert len({chart["uuid"] for chart in charts}) == len(charts)
        shown = {chart.get("metricKey") for chart in charts if not chart["deleted"]}
        hidden = {chart["metricKey"] for chart in charts if chart["deleted"]}
        assert hidden == {*view.hidden}
        assert not shown & hidden


def test_a_study_shows_what_it_varied_against_what_it_maximised() -> None:
    view = of_study("my study!", "f" * 32, ["train.lr", "train.kl_coef"], 4)
    state = json.loads(view.tag()[1])
    assert view.key == f"grpo-study-my-study-{'f' * 8}"
    assert state["orderByKey"] == "metrics.`eval/pass_at_4`"
    assert f"'{'f' * 32}'" in state["searchFilter"]
    points = [(c["xaxis"]["key"], c["yaxis"]["key"]) for c in state["compareRunCharts"] if c["type"] == "SCATTER"]
    assert points == [("train.log10_lr", "eval/pass_at_4"), ("train.kl_coef", "eval/pass_at_4")]


def test_a_view_that_no_tag_holds_is_left_out() -> None:
    many = [f"data.arithmetic.{number}.{number * 7919 % 10007}" for number in range(3000)]
    assert views.packed("a", of_study("s", "0" * 32, many, 1).tag()[1], None) is None


def test_addresses_open_the_mode_that_has_runs() -> None:
    assert pages.of_run("3", "ab") == "#/experiments/3/runs/ab?workflowType=machine_learning"
    address = pages.of_view("3", "k-1")
    assert address == ("#/experiments/3/runs?workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey=k-1")
