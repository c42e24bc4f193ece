"""Search spaces: what is suggested is what the trial's config holds, and a malformed space is one clear line."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from grpo_mlflow.config import TRAITS, Resolved, flatten, overlay, resolve
from grpo_mlflow.errors import ConfigError, UserError
from grpo_mlflow.search import choices, space, space_file
from grpo_mlflow.search.settings import pinned
from grpo_mlflow.search.storage import open_storage
from tests.support.paths import ROOT

GUIDE = "train.lr=[5e-6,1e-5,2e-5] train.kl_coef=[0.02,0.05,0.1] train.batch_size=[4,8]"

KINDS: dict[str, tuple[str, BaseDistribution]] = {
    "float": ("train.clip_high: {low: 0.2, high: 0.4}", FloatDistribution(0.2, 0.4)),
    "log": ("train.lr: {low: 1e-5, high: 1e-3, log: true}", FloatDistribution(1e-5, 1e-3, log=True)),
    "float step": ("generation.temperature: {low: 0.7, high: 1.1, step: 0.1}", FloatDistribution(0.7, 1.1, step=0.1)),
    "mixed ends": ("train.kl_coef: {low: 0, high: 0.1}", FloatDistribution(0, 0.1)),
    "whole ends of a float": ("train.weight_decay: {low: 0, high: 1}", FloatDistribution(0, 1)),
    "int": ("train.epochs: {low: 1, high: 4}", IntDistribution(1, 4)),
    "int log": ("data.problems_per_iteration: {low: 8, high: 64, log: true}", IntDistribution(8, 64, log=True)),
    "int step": ("data.rollouts_per_problem: {low: 4, high: 16, step: 4}", IntDistribution(4, 16, step=4)),
    "one value": ("train.epochs: {low: 2, high: 2}", IntDistribution(2, 2)),
    "words": ("train.aggregation: [grpo, dapo, dr_grpo]", CategoricalDistribution(("grpo", "dapo", "dr_grpo"))),
    "numbers": ("train.lr: {choices: [5e-6, 1e-5]}", CategoricalDistribution((5e-6, 1e-5))),
    "null": ("train.grad_clip: [null, 0.5, 1.0]", CategoricalDistribution((None, 0.5, 1.0))),
    "number or word": ("train.grad_accum_steps: [1, auto]", CategoricalDistribution((1, "auto"))),
    "seed": ("seed: {low: 0, high: 9}", IntDistribution(0, 9)),
}

# Malformed spaces, each a file, and what the one line must hold.
FILES: dict[str, tuple[str, list[str]]] = {
    "unknown key": ("train.lrr: [1]", ["train.lrr"]),
    "section": ("train: {lr: [1e-4]}", ["train:", "cannot vary"]),
    "number as key": ("3: [1, 2]", ["3:", "cannot vary"]),
    "how it is measured": ("eval.num_ids: [8, 16]", ["eval.num_ids", "cannot vary", "train."]),
    "the task": ("data.task: [arithmetic, sat]", ["data.task", "cannot vary", "decides what evaluations measure"]),
    "its settings": ("data.arithmetic.digits: [1, 2]", ["data.arithmetic.digits", "decides what evaluations measure"]),
    "its prompt": ("data.system_prompt: [null, Be brief.]", ["data.system_prompt", "decides what evaluations measure"]),
    "how it is kept": ("checkpoint.keep_last: [1, 2]", ["checkpoint.keep_last", "cannot vary"]),
    "the search itself": ("search.n_trials: [1, 2]", ["search.n_trials", "cannot vary"]),
    "an earlier name": (
        "train.sampler_correction_cap: [1, 2]",
        ["train.importance_sampling_mode and train.importance_sampling_cap now"],
    ),
    "refused choice": ("train.lr: [1e-4, -1]", ["train.lr = -1", "greater than 0"]),
    "refused word": ("train.aggregation: [grpo, mean]", ["train.aggregation = 'mean'", "'dapo'"]),
    "refused low": ("train.lr: {low: 0, high: 1e-3}", ["train.lr = 0", "greater than 0"]),
    "refused high": ("train.epochs: {low: 1, high: 2.5}", ["train.epochs", "integer"]),
    "contradicts the rest": (
        "data.problems_per_iteration: [64, 8192]",
        ["data.problems_per_iteration = 8192", "data.num_train_seeds = 4096"],
    ),
    "low above high": ("train.lr: {low: 1e-3, high: 1e-4}", ["train.lr", "low <= high", "0.001"]),
    "log from 0": ("train.lr: {low: 0, high: 1e-3, log: true}", ["train.lr", "low > 0", "log"]),
    "log with step": ("train.lr: {low: 1e-4, high: 1e-3, log: true, step: 1e-4}", ["train.lr", "step", "log"]),
    "int log with step": ("train.epochs: {low: 1, high: 4, log: true, step: 2}", ["train.epochs", "step", "log"]),
    "step 0": ("train.epochs: {low: 1, high: 4, step: 0}", ["train.epochs", "step > 0"]),
    "negative step": ("train.lr: {low: 1e-4, high: 1e-3, step: -1e-4}", ["train.lr", "step > 0"]),
    "nan": ("train.lr: {low: .nan, high: 1e-3}", ["train.lr", "nan"]),
    "inf": ("train.lr: {low: 1e-4, high: .inf}", ["train.lr", "inf"]),
    "no high": ("train.lr: {low: 1e-4}", ["train.lr", "low and high"]),
    "text as low": ("train.lr: {low: small, high: 1}", ["train.lr", "'small'", "numbers low and high"]),
    "true as low": ("train.epochs: {low: true, high: 3}", ["train.epochs", "numbers low and high"]),
    "no range": ("train.lr: {}", ["train.lr", "choices, or numbers low and high"]),
    "one value": ("train.lr: 1e-4", ["train.lr = 0.0001", "a list of values"]),
    "nothing": ("train.lr:", ["train.lr", "a list of values"]),
    "no choice": ("train.lr: []", ["train.lr", "choices = []", "at least one value"]),
    "twice": ("train.lr: [1e-4, 1e-4]", ["train.lr", "twice"]),
    "equal numbers": ("train.epochs: [1, 1.0]", ["train.epochs", "twice"]),
    "choices and range": ("train.lr: {choices: [1e-4], low: 1e-5}", ["train.lr", "no range"]),
    "choices as mapping": ("train.lr: {choices: {a: 1}}", ["train.lr", "choices = {'a': 1}"]),
    "list in a list": ("train.loss_options: [[0.3, 0.7]]", ["train.loss_options", "numbers, words"]),
    "unknown field": ("train.lr: {lo: 1e-4, high: 1e-3}", ["train.lr", "'lo' is unknown", "low, high"]),
    "when below": (
        "train.clip_high: {low: 0.2, high: 0.4, when: {train.epochs: [2]}}\ntrain.epochs: [1, 2]",
        ["train.clip_high", "when names train.epochs", "above"],
    ),
    "when itself": ("train.epochs: {choices: [1, 2], when: {train.epochs: [1]}}", ["when names train.epochs"]),
    "when of no list": (
        "train.epochs: [1, 2]\ntrain.clip_high: {low: 0.2, high: 0.4, when: {train.epochs: 2}}",
        ["train.clip_high", "when = {'train.epochs': 2}", "lists of values"],
    ),
    "when empty": (
        "train.epochs: [1, 2]\ntrain.clip_high: {low: 0.2, high: 0.4, when: {train.epochs: []}}",
        ["train.clip_high", "lists of values"],
    ),
    "when that never is": (
        "train.epochs: [1, 2]\ntrain.clip_high: {low: 0.2, high: 0.4, when: {train.epochs: [3]}}",
        ["train.clip_high", "train.epochs is never 3"],
    ),
    "step that does not divide": ("train.epochs: {low: 1, high: 4, step: 2}", ["train.epochs", "step = 2", "divisor"]),
    "when as list": ("train.epochs: {choices: [1, 2], when: [seed]}", ["train.epochs", "when = ['seed']"]),
    "a list": ("- train.lr", ["expected settings", "train.lr: [1e-5, 1e-4]"]),
    "a word": ("train.lr", ["expected settings"]),
    "empty": ("", ["expected settings"]),
    "broken YAML": ("train.lr: [1e-4\n", ["line 2", "not valid YAML"]),
    "key twice": ("train.lr: [1e-4]\ntrain.lr: [2e-4]", ["line 2", "'train.lr' is given twice"]),
    "code": ("train.lr: !!python/object/apply:os.system [true]", ["not valid YAML"]),
}
LINES: dict[str, list[str]] = {
    "nowhere.yaml": ["'nowhere.yaml'", "no such file or space", "full", "tiny"],
    "~nobody_here/a.yaml": ["no such file or space"],
    "/": ["no such file or space"],
    "train.lr=1e-4": ["train.lr = 0.0001", "a list of values"],
    "train.lr=": ["train.lr = None", "a list of values"],
    "train.lr=[1e-4": ["not valid YAML", "']'"],
    "train.lr='[1e-4]": ["no closing quotation"],
    "train.lr=[1e-4] train.epochs": ["train.epochs"],
    "=[1]": ["cannot vary"],
}
GRIDS: dict[str, tuple[str, list[str]]] = {
    "continuous": ("train.lr: {low: 1e-4, high: 1e-3}", ["train.lr", "search.sampler = grid", "a list of values"]),
    "log": ("train.lr: {low: 1e-4, high: 1e-3, log: true}", ["train.lr", "grid", "a list of values"]),
    "int log": ("train.epochs: {low: 1, high: 4, log: true}", ["train.epochs", "grid", "a list of values"]),
    "when": (
        "train.epochs: [1, 2]\ntrain.clip_high: {choices: [0.2, 0.3], when: {train.epochs: [2]}}",
        ["train.clip_high", "grid", "without `when`"],
    ),
}


@pytest.fixture(scope="module")
def base() -> Resolved:
    return resolve("tiny")


def load(text: str, base: Resolved, folder: Path) -> space.Space:
    path = folder / "space.yaml"
    path.write_text(text)
    return space_file.load(str(path), base)


def settings(resolved: Resolved) -> dict[str, Any]:
    return flatten(resolved.config.model_dump(mode="json"))


def trials_of(found: space.Space, count: int = 40) -> list[tuple[optuna.Trial, dict[str, Any]]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [(trial, found.suggest(trial)) for trial in (study.ask() for _ in range(count))]


def same(found: Mapping[str, Any], suggested: Mapping[str, Any]) -> bool:
    """Equal in value and kind: 1 is neither 1.0's word nor true."""
    return all(
        found[key] == value and isinstance(found[key], bool) == isinstance(value, bool)
        for key, value in suggested.items()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_suggested_is_in_range_and_in_the_config(kind: str, base: Resolved, tmp_path: Path) -> None:
    text, distribution = KINDS[kind]
    found = load(text, base, tmp_path)
    assert [dimension.distribution for dimension in found.dimensions] == [distribution]
    before, seen = settings(base), set()
    for trial, values in trials_of(found):
        assert trial.distributions == dict.fromkeys(values, distribution)
        assert trial.params == values
        ((key, value),) = values.items()
        assert distribution._contains(distribution.to_internal_repr(value))
        resolved = overlay(base, values, "trial")
        after = settings(resolved)
        assert same(after, values)
        assert {name for name in after if after[name] != before[name]} <= {key}
        assert resolved.origins[key] == "trial"
        seen.add(value)
    assert len(seen) > 1 or distribution.single()


@pytest.mark.parametrize("name", space_file.shipped())
@pytest.mark.parametrize("preset", ["tiny", "qwen"])
def test_every_value_of_a_shipped_space_is_in_the_config(name: str, preset: str) -> None:
    base = resolve(preset, ["generation.base_url=http://localhost:8000"] if preset == "qwen" else [])
    found = space_file.load(name, base)
    before = settings(base)
    keys = {dimension.key for dimension in found.dimensions}
    suggested: set[str] = set()
    for trial, values in trials_of(found):
        resolved = overlay(base, values, "trial")
        after = settings(resolved)
        assert trial.params == values
        assert same(after, values)
        assert {key: after[key] for key in after.keys() - values.keys()} == {
            key: before[key] for key in before.keys() - values.keys()
        }
        assert {key for key, origin in resolved.origins.items() if origin == "trial"} == values.keys()
        suggested |= values.keys()
    assert suggested == keys


def test_the_shipped_spaces() -> None:
    assert {"full", "lora", "tiny"} <= set(space_file.shipped())


def test_a_setting_that_is_not_switched_on_keeps_the_value_of_the_base(base: Resolved, tmp_path: Path) -> None:
    text = """
train.epochs: [1, 2, 3]
train.ratio_level: {choices: [token, sequence], when: {train.epochs: [2, 3]}}
train.clip_high: {low: 0.3, high: 0.4, when: {train.epochs: [2, 3], train.ratio_level: [sequence]}}
"""
    seen = set()
    for trial, values in trials_of(load(text, base, tmp_path)):
        expected = {"train.epochs"}
        if values["train.epochs"] != 1:
            expected.add("train.ratio_level")
            if values["train.ratio_level"] == "sequence":
                expected.add("train.clip_high")
        assert values.keys() == trial.params.keys() == expected
        after = settings(overlay(base, values, "trial"))
        assert same(after, values)
        if "train.ratio_level" not in values:
            assert after["train.ratio_level"] == base.config.train.ratio_level
        if "train.clip_high" not in values:
            assert after["train.clip_high"] == base.config.train.clip_high
        seen.add(len(values))
    assert seen == {1, 2, 3}


def test_the_configs_own_settings_are_known_to_the_space(base: Resolved, tmp_path: Path) -> None:
    text = """
train.lr: {low: 1e-4, high: 1e-3, log: true}
train.epochs: [1, 2]
train.clip_high: {low: 0.2, high: 0.4, when: {train.epochs: [2]}}
"""
    found = load(text, base, tmp_path)
    own = {"train.lr": 4e-4, "train.epochs": 1}
    assert found.own(base.config) == own
    assert choices.queue(base.config, found)[:2] == [own, {}]
    assert found.own(overlay(base, {"train.epochs": 2}, "test").config) == {
        **own,
        "train.epochs": 2,
        "train.clip_high": 0.2,
    }
    outside = overlay(base, {"train.lr": 1e-5}, "test").config
    assert found.own(outside) is None
    assert choices.queue(outside, found) == [{}] * 12


def test_own_settings_stay_own_where_the_method_varies(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: tiny\ntrain: {method: dapo, clip_high: 0.35}\n")
    mine = resolve(str(tmp_path / "mine.yaml"))
    own = space_file.load("train.method=[grpo,dapo]", mine).own(mine.config)
    assert own == {"train.method": "dapo"}
    assert overlay(mine, own, "trial").config == mine.config
    assert overlay(mine, {"train.method": "grpo"}, "trial").config.train.clip_high == 0.2


CHAIN = """
train.kl_coef: [0.0, 0.05]
train.kl_estimator: {choices: [k2, k3], when: {train.kl_coef: [0.05]}}
train.kl_target: {choices: [0.05, 0.1], when: {train.kl_estimator: [k3]}}
"""


def test_a_chain_of_conditions_is_switched_on_as_a_whole(tmp_path: Path) -> None:
    base = resolve("tiny", ["train.kl_coef=0"])
    found = load(CHAIN, base, tmp_path)
    every = found.all_settings(10)
    assert every == [
        {"train.kl_coef": 0.0},
        {"train.kl_coef": 0.05, "train.kl_estimator": "k2"},
        *({"train.kl_coef": 0.05, "train.kl_estimator": "k3", "train.kl_target": target} for target in (0.05, 0.1)),
    ]
    assert found.all_settings(3) is None
    assert load("train.lr: {low: 1e-4, high: 1e-3}", base, tmp_path).all_settings(10) is None
    drawn = {tuple(values.items()) for _, values in trials_of(found)}
    assert drawn == {tuple(values.items()) for values in every}


def test_what_can_never_be_on_is_one_line(base: Resolved, tmp_path: Path) -> None:
    text = CHAIN + "train.lr: {choices: [1e-4], when: {train.kl_target: [0.1], train.kl_coef: [0.0]}}"
    with pytest.raises(ConfigError) as error:
        load(text, base, tmp_path)
    refused(error, ["train.lr: is never on", "train.kl_coef"])


def test_a_grid_whose_combination_the_config_refuses_is_one_line(base: Resolved) -> None:
    found = space_file.load("data.problems_per_iteration=[64,128] data.num_train_seeds=[100,4096]", base)
    with pytest.raises(ConfigError) as error:
        found.require_grid(base)
    refused(error, ["data.problems_per_iteration = 128", "data.num_train_seeds = 100"])


def test_the_guides_sweep_has_18_combinations() -> None:
    overrides = ["search.sampler=grid", f"search.space={GUIDE}", "train.grad_accum_steps=1"]
    base = resolve("tiny", overrides)
    found = space_file.load(base.config.search.space, base)
    assert found.grid() == {
        "train.lr": [5e-6, 1e-5, 2e-5],
        "train.kl_coef": [0.02, 0.05, 0.1],
        "train.batch_size": [4, 8],
    }
    wanted = choices.queue(base.config, found)
    assert len(wanted) == 18
    assert {tuple(fixed.values()) for fixed in wanted} == set(itertools.product(*found.grid().values()))
    study = optuna.create_study(sampler=choices.sampler(base.config, 0))
    for fixed in wanted:
        study.enqueue_trial(fixed)
    for fixed in wanted:
        values = found.suggest(study.ask())
        assert values == fixed
        assert same(settings(overlay(base, values, "trial")), fixed)


def test_a_grid_of_steps(base: Resolved, tmp_path: Path) -> None:
    text = "train.epochs: {low: 1, high: 3}\ngeneration.temperature: {low: 0.7, high: 1.1, step: 0.1}"
    found = load(text, base, tmp_path)
    grid = found.grid()
    assert grid["train.epochs"] == [1, 2, 3]
    assert grid["generation.temperature"] == [0.7, 0.8, 0.9, 1.0, 1.1]
    study = optuna.create_study()
    for fixed in itertools.product(*grid.values()):
        study.enqueue_trial(dict(zip(grid, fixed, strict=True)))
        assert tuple(found.suggest(study.ask()).values()) == pytest.approx(fixed)


def test_a_line_and_a_file_say_the_same(base: Resolved, tmp_path: Path) -> None:
    line = space_file.load("train.lr=[5e-6,1e-5] 'train.epochs={low: 1, high: 3}'", base)
    assert line == load("train.lr: [5e-6, 1e-5]\ntrain.epochs: {low: 1, high: 3}", base, tmp_path)
    assert line == space_file.load("train.lr=[5e-6, 1e-5] train.epochs={low: 1, high: 3}", base)


def refused(error: pytest.ExceptionInfo[ConfigError], fragments: list[str]) -> None:
    text = str(error.value)
    assert len(text.splitlines()) == 1
    assert [fragment for fragment in fragments if fragment not in text] == []


@pytest.mark.parametrize("name", FILES)
def test_a_malformed_space_is_one_line(name: str, base: Resolved, tmp_path: Path) -> None:
    text, fragments = FILES[name]
    with pytest.raises(ConfigError) as error:
        load(text, base, tmp_path)
    refused(error, fragments)


@pytest.mark.parametrize("key", TRAITS)
def test_a_setting_varies_only_where_it_says_so(key: str, base: Resolved) -> None:
    with pytest.raises(ConfigError) as error:
        space_file.load(f"{key}=1", base)  # no list of values, which is told of settings that may vary
    allowed = "a list of values" if TRAITS[key].varies else "keys of seed, model., generation., train., data."
    refused(error, [f": {key}", f"allowed: {allowed}"])


SERVER = ("generation.backend=vllm_server", "generation.base_url=http://a:1")
ENGINES: list[tuple[tuple[str, ...], str, str]] = [
    (
        SERVER,
        "generation.base_url=[http://a:1,http://b:1]",
        "generation.base_url: cannot vary, since it decides what eval",
    ),
    (
        SERVER,
        "generation.server.arguments=[null]",
        "generation.server.arguments: cannot vary, since it decides what eval",
    ),
    (
        SERVER,
        "generation.backend=[local,vllm_server]",
        "eval.base_url = null: .*; allowed: http://HOST:PORT, or eval.backend",
    ),
    (SERVER, "generation.sync=[reload,none]", "generation.sync = 'none': .* would measure those again and again"),
    (
        (SERVER[1], "search.n_jobs=2"),
        "generation.backend=[local,vllm_server]",
        "search.n_jobs = 2: .* into the same server",
    ),
]


@pytest.mark.parametrize(("words", "line", "told"), ENGINES, ids=[line for _, line, _ in ENGINES])
def test_a_space_cannot_send_evaluations_of_some_trials_elsewhere(words: tuple[str, ...], line: str, told: str) -> None:
    with pytest.raises(ConfigError, match=f"^[^\\n]*{told}[^\\n]*$"):
        space_file.load(line, pinned(resolve("tiny", words)))


@pytest.mark.parametrize(
    ("words", "expected"),
    [((SERVER[1],), ("local", None)), ((*SERVER, "eval.base_url=http://b:1"), ("vllm_server", "http://b:1"))],
)
def test_who_evaluates_stays_where_who_samples_varies(words: tuple[str, ...], expected: tuple[str, str | None]) -> None:
    study = pinned(resolve("tiny", words))
    found = space_file.load("generation.backend=[local,vllm_server]", study)
    for value in ("local", "vllm_server"):
        trial = overlay(study, {found.dimensions[0].key: value}, "trial").config
        assert trial.generation.backend == value
        assert (trial.eval.backend, trial.eval.base_url) == expected


@pytest.mark.parametrize("line", LINES)
def test_a_malformed_line_is_one_line(line: str, base: Resolved) -> None:
    with pytest.raises(ConfigError) as error:
        space_file.load(line, base)
    refused(error, LINES[line])


@pytest.mark.parametrize("name", GRIDS)
def test_what_has_no_grid_is_one_line(name: str, base: Resolved, tmp_path: Path) -> None:
    text, fragments = GRIDS[name]
    found = load(text, base, tmp_path)
    with pytest.raises(ConfigError) as error:
        found.grid()
    refused(error, fragments)


# Words of the command, and what its one line must hold; {} is a file with a malformed space.
COMMANDS: list[tuple[list[str], list[str]]] = [
    (["--space", "nowhere.yaml"], ["search.space = 'nowhere.yaml'", "no such file or space", "tiny"]),
    (["--space", "{}"], ["space.yaml", "train.lr", "low <= high"]),
    (["--space", "eval.num_ids=[8,16]"], ["eval.num_ids", "cannot vary"]),
    (["--space", "train.lr=[fast]"], ["train.lr = 'fast'", "number"]),
    (["--sampler", "grid", "--space", "tiny"], ["train.lr", "search.sampler = grid", "a list of values"]),
    (["--sampler", "best"], ["search.sampler = 'best'", "'tpe'", "'grid'"]),
    (["--pruner", "none at all"], ["search.pruner = 'none at all'", "'paired'"]),
    (["--n_trials", "0"], ["search.n_trials = 0", "greater than or equal to 1"]),
    (["--timeout", "-1"], ["search.timeout = -1", "greater than 0"]),
    (["search.k=64", "eval.replicates=8"], ["search.k = 64", "eval.replicates = 8"]),
    (["--sampler", "nsga2", "--pruner", "paired"], ["search.pruner = 'paired'", "nsga2", "allowed: none"]),
    (["search.objective=best", "search.k=4"], ["search.objective = 'best'", "search.k = 4", "last, mean"]),
    (["search.objective=first"], ["search.objective = 'first'", "'last'"]),
    (["search.confirm_replicates=2"], ["search.confirm_replicates = 2", "pass@4", "4 or more"]),
    (["eval.enabled=false"], ["eval.enabled = false", "allowed: true"]),
    (["--storage", "optuna.db"], ["search.storage = 'optuna.db'", "sqlite:///FILE", "journal:FILE"]),
    (["--storage", "mongodb://host/db"], ["search.storage = 'mongodb://host/db'", "postgresql://"]),
    (["--storage", "journal:"], ["search.storage = 'journal:'", "names no file"]),
    (["search.confirm_seed_start=5000"], ["search.confirm_seed_start = 5000", "overlap", "5256 or more"]),
]


def test_without_its_driver_postgresql_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(UserError, match=r"search\.storage = .*; needed: pip install -e '\.\[postgresql\]'"):
        open_storage("postgresql://me@127.0.0.1:1/db")


# Storages that are named well but cannot be opened.
UNREACHABLE: list[tuple[list[str], list[str]]] = [
    (["--storage", "sqlite:////nowhere/at/all/optuna.db"], ["sqlite:////nowhere/at/all/optuna.db", "unable to open"]),
    (["--storage", "postgresql://me:secret@127.0.0.1:1/db"], ["postgresql://***@127.0.0.1:1/db", "efused"]),
]


@pytest.mark.parametrize(
    ("words", "fragments", "code"),
    [(*case, 2) for case in COMMANDS] + [(*case, 1) for case in UNREACHABLE],
    ids=[" ".join(words) for words, _ in COMMANDS + UNREACHABLE],
)
def test_a_mistake_ends_the_command_before_anything_starts(
    words: list[str], fragments: list[str], code: int, tmp_path: Path
) -> None:
    (tmp_path / "space.yaml").write_text("train.lr: {low: 1e-3, high: 1e-4}")
    done = subprocess.run(
        [sys.executable, "-m", "grpo_mlflow", "optimize", *(word.format("space.yaml") for word in words)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout) == (code, "")
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert [fragment for fragment in fragments if fragment not in lines[0]] == []
    assert [path.name for path in tmp_path.iterdir()] == ["space.yaml"]


def test_a_scale_that_the_tasks_rewards_do_not_allow_is_refused_before_a_trial() -> None:
    base = resolve("tiny", ["data.task=sat"])
    with pytest.raises(ConfigError, match=r"train\.scale_rewards = 'mean': .*'sat' gives rewards down to -"):
        space_file.load("train.scale_rewards=[none,mean]", base)
