"""`train.method`: what each sets and what wins over it, the table of docs/methods.md, and that each one trains."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from grpo_mlflow import runs
from grpo_mlflow.config import Resolved, TrainConfig, dump, flatten, overlay, resolve, yaml12
from grpo_mlflow.config.methods import SETTINGS, Method
from grpo_mlflow.errors import ConfigError
from tests.support.paths import DOCS
from tests.support.small_runs import SMALL, curves

METHODS: tuple[Method, ...] = get_args(Method)
EVERY_METHOD = pytest.mark.parametrize("method", METHODS)


def values(resolved: Resolved) -> dict[str, Any]:
    return flatten(resolved.config.model_dump())


def test_the_table_of_the_docs_is_what_the_methods_set() -> None:
    rows = [
        [cell.strip().strip("`") for cell in line.strip().strip("|").split("|")]
        for line in (DOCS / "methods.md").read_text().split("## What they are")[0].splitlines()
        if line.startswith("| ") and "---" not in line
    ]
    assert tuple(rows[0][1:]) == METHODS
    table = {name: {row[0]: yaml12.load(row[column], "") for row in rows[1:]} for column, name in enumerate(METHODS, 1)}
    assert table == {name: SETTINGS[name] for name in METHODS}


@EVERY_METHOD
@pytest.mark.parametrize("preset", ["tiny", "qwen"])
def test_a_method_sets_all_that_any_sets_and_nothing_else(preset: str, method: Method) -> None:
    plain, chosen = resolve(preset), resolve(preset, [f"train.method={method}"])
    expected = {**values(plain), **SETTINGS[method], "train.method": method}
    assert values(chosen) == expected
    for key in SETTINGS[method]:
        assert chosen.origins[key] == f"method {method}"
    assert SETTINGS[method].keys() == SETTINGS["grpo"].keys()
    assert not chosen.warnings


def test_grpo_is_the_defaults() -> None:
    fields = flatten({"train": TrainConfig().model_dump(), "data": {"resample_rounds": 0}})
    assert SETTINGS["grpo"].items() <= fields.items()
    assert fields["train.method"] == "grpo"


def test_a_key_beside_the_method_wins_in_any_order() -> None:
    for words in (["train.method=dapo", "train.clip_high=0.4"], ["train.clip_high=0.4", "train.method=dapo"]):
        resolved = resolve("tiny", words)
        assert resolved.config.train.clip_high == 0.4
        assert resolved.origins["train.clip_high"] == "override"
        assert resolved.origins["train.aggregation"] == "method dapo"


def test_in_a_file_the_method_wins_over_its_base_and_loses_to_the_file(tmp_path: Path) -> None:
    base, own = tmp_path / "base.yaml", tmp_path / "own.yaml"
    base.write_text("base: tiny\ntrain: {method: gspo, epochs: 2, kl_coef: 0.3}\n")
    own.write_text("base: base.yaml\ntrain: {method: dapo, clip_low: 0.1}\n")
    first, second = resolve(str(base)), resolve(str(own))
    assert (first.config.train.ratio_level, first.config.train.kl_coef) == ("sequence", 0.3)
    expected = {**values(first), **SETTINGS["dapo"], "train.method": "dapo", "train.clip_low": 0.1}
    assert values(second) == expected
    assert second.origins["train.clip_low"] == "file own.yaml"
    third = resolve(str(own), ["train.method=grpo"])
    assert values(third) == {**values(first), **SETTINGS["grpo"], "train.method": "grpo"}


def test_a_resolved_config_repeats_itself(tmp_path: Path) -> None:
    resolved = resolve("tiny", ["train.method=dapo", "train.clip_high=0.4"])
    (tmp_path / "resolved.yaml").write_text(dump(resolved.config))
    assert resolve(str(tmp_path / "resolved.yaml")).config == resolved.config


def test_a_study_that_varies_the_method_keeps_what_the_command_line_says() -> None:
    base = resolve("tiny", ["train.kl_coef=0.2"])
    trial = overlay(base, {"train.method": "dapo", "train.lr": 1e-4}, "trial")
    expected = {**SETTINGS["dapo"], "train.method": "dapo", "train.lr": 1e-4, "train.kl_coef": 0.2}
    assert values(trial) == {**values(base), **expected}
    assert trial.origins["train.clip_high"] == "method dapo"
    again = overlay(trial, {"seed": 7}, "confirmation")
    assert values(again) == {**values(trial), "seed": 7}


def test_an_unknown_method_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve("tiny", ["train.method=ppo"])
    assert re.fullmatch(
        r"train\.method = 'ppo' \(override\): input should be 'grpo', .* or 'rloo' \[.*\]", str(caught.value)
    )


@EVERY_METHOD
def test_each_method_trains(method: Method, shared_store: str) -> None:
    words = [word for word in SMALL if not word.startswith(("train.kl_", "train.iterations", "eval."))]
    words += [f"train.method={method}", "train.iterations=2", "eval.enabled=false", f"tracking.uri={shared_store}"]
    finished = runs.train(resolve("tiny", words))
    found = curves(shared_store, finished.run_id)
    assert [step for step, _ in found["train/loss_total"]] == [0, 1]
    assert all(math.isfinite(value) for points in found.values() for _, value in points)
    assert max(value for _, value in found["train/grad_norm"]) > 0
    assert ("train/resampled_problems" in found) == (method == "dapo")
