"""Every setting says what it means and takes, and help, docs/settings.md and the JSON schema say the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from grpo_mlflow.config import (
    Config,
    document,
    json_schema,
    nest,
    parse_arguments,
    parse_overrides,
    presets,
    resolve,
    yaml12,
)
from grpo_mlflow.config.describe import settings
from grpo_mlflow.config.keys import KEYS, SECTIONS
from grpo_mlflow.errors import ConfigError
from tests.support import docs_commands
from tests.support import json_schema as check
from tests.support.paths import ROOT

BACKENDS = ("local", "vllm_server", "sglang_server")
SCHEMA: dict[str, Any] = json.loads(json_schema.text())


def shown(capsys: pytest.CaptureFixture[str], *words: str, columns: int = 80) -> str:
    """Return what a command prints that ends with its help."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit) as end:
            parse_arguments(words, "grpo train", "Train a model.")
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("key", KEYS)
def test_a_setting_says_what_it_means_and_takes(key: str) -> None:
    setting = settings()[key]
    assert len(setting.meaning.split()) >= 3
    assert not setting.meaning.endswith(".")
    assert setting.allowed
    if "null" in setting.allowed:
        assert "null" in setting.meaning, "what null does"


@pytest.mark.parametrize(
    ("key", "allowed", "choices"),
    [
        ("train.lr", "number above 0", ()),
        ("train.clip_low", "number, 0 to 1", ()),
        ("generation.top_p", "number above 0, at most 1", ()),
        ("train.grad_accum_steps", "integer, 1 or more; or auto", ("auto",)),
        ("train.surrogate", "clip or cispo", ("clip", "cispo")),
        ("train.optimizer", "adamw, sgd or adamw8bit", ("adamw", "sgd", "adamw8bit")),
        ("eval.greedy", "true or false", ("true", "false")),
        ("eval.ks", "list, each integer, 1 or more", ()),
        ("model.ref_device", "cpu, cuda or cuda:N; or null", ("cpu", "cuda", "null")),
        (
            "eval.backend",
            "local, vllm_server, sglang_server or null",
            ("local", "vllm_server", "sglang_server", "null"),
        ),
        ("data.mix", "mapping of names to: number above 0", ()),
        ("data.sat.difficulty", "list of 2, each number, 0 to 1", ()),
    ],
)
def test_what_a_setting_takes(key: str, allowed: str, choices: tuple[str, ...]) -> None:
    assert (settings()[key].allowed, settings()[key].choices) == (allowed, choices)


def test_the_choices_of_a_setting_are_taken() -> None:
    """As values: what they contradict is another matter."""
    for key, setting in settings().items():
        for choice in setting.choices:
            Config.model_validate(nest(parse_overrides([f"{key}={choice}"])))


def test_values_of_presets_and_methods_are_those_in_effect() -> None:
    lr, high = settings()["train.lr"], settings()["train.clip_high"]
    assert lr.default == resolve("qwen").config.train.lr
    assert "qwen" not in lr.presets
    assert lr.presets["tiny"] == resolve("tiny").config.train.lr != lr.default
    assert lr.presets["smoke"] == resolve("smoke").config.train.lr, "by way of its base"
    assert high.methods["dapo"] == resolve("tiny", ["train.method=dapo"]).config.train.clip_high


@pytest.mark.parametrize("key", KEYS)
def test_help_of_a_setting(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    text, setting = shown(capsys, "--help", key), settings()[key]
    flat = " ".join(text.split())
    assert flat.startswith(f"{key}: {setting.meaning} takes {setting.allowed} default {yaml12.inline(setting.default)}")
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("section", SECTIONS)
def test_help_of_a_section_has_all_its_settings(section: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "--help", section)
    inside = [key for key in KEYS if key.rpartition(".")[0] == section]
    assert [line.split(" = ")[0] for line in text.splitlines() if " = " in line and line[0] != " "] == inside
    for below in (name for name in SECTIONS if name.rpartition(".")[0] == section):
        assert f"--help {below} " in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_help_lists_the_sections_within_the_terminal(columns: int, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "--help", columns=columns)
    assert all(f"  {section} " in f"{text} ".replace("\n", " ") for section in SECTIONS)
    assert "--help KEY" in text
    assert max(map(len, text.splitlines())) <= max(columns, 56), "the example of values stays in one piece"


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ([], "0.0004 (preset tiny)"),
        (["--config", "rows"], "2.0e-05 (preset rows)"),
        (["--config", "rows", "train.lr=1"], "1.0 (override)"),
        (["model.train_id=some/model"], "1.0e-05 (default)"),
    ],
)
def test_help_shows_the_value_and_its_origin(words: list[str], value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"value here  {value}\n" in shown(capsys, *words, "--help", "train.lr")
    assert f"train.lr = {value}\n" in shown(capsys, *words, "--help", "train")


@pytest.mark.parametrize(
    "words", [["train.lr=x"], ["resume=0123456789abcdef0123456789abcdef"], ["--config", "none.yaml"]]
)
def test_help_shows_no_value_that_would_not_be_in_effect(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, *words, "--help", "train.lr")
    assert "number above 0" in text
    assert "value here" not in text


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("lr", "train.lr"),
        ("train.kl_coeff", "train.kl_coef"),
        ("train.temperature", "generation.temperature"),
        ("trian", "train"),
        ("kl", "train.kl_target"),
        ("qqqq", "sections: model, "),
    ],
)
def test_an_unknown_topic_is_one_line_with_what_is_near(name: str, near: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_arguments(["--help", name], "grpo train", "Train a model.")
    assert str(caught.value).startswith(f"--help {name}: no such setting or section; ")
    assert near in str(caught.value)
    assert "\n" not in str(caught.value)


def test_help_hides_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "tracking.uri=postgresql://me:opensesame@host/db", "--help", "tracking.uri")
    assert "postgresql://***@host/db" in text
    assert "opensesame" not in text


@pytest.mark.parametrize(("name", "path"), [("settings", document.PAGE), ("schema", json_schema.PATH)])
def test_what_is_generated_is_up_to_date(name: str, path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "grpo_mlflow.config.document", name],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert done.stdout == path.read_text(), "run: python -m grpo_mlflow.config.document"


def test_the_page_has_every_setting_once() -> None:
    lines = document.PAGE.read_text().splitlines()
    assert sorted(line.split("`")[1] for line in lines if line.startswith("| `")) == sorted(KEYS)


def refused(content: Any) -> list[str]:
    return list(check.errors(content, SCHEMA))


def files() -> dict[str, str]:
    """Return every config that is shipped or shown: presets, files and blocks of the docs."""
    found = {name: (ROOT / f"grpo_mlflow/presets/{name}.yaml").read_text() for name in presets()}
    found |= {path.name: path.read_text() for path in (ROOT / "docs").glob("*.yaml")}
    names = {"base", *(key.partition(".")[0] for key in KEYS)}
    for page in docs_commands.PAGES:
        for line, _, text in docs_commands.blocks(page.read_text()):
            begins = text.partition(":")[0].strip()
            if begins in names and f"{begins}:" in text and "=" not in text.partition("\n")[0]:
                found[f"{page.name}:{line}"] = text
    return found


@pytest.mark.parametrize(("name", "text"), files().items())
def test_the_schema_takes_the_configs_that_we_show(name: str, text: str) -> None:
    assert refused(yaml12.load(text, name)) == []


def test_there_are_such_configs() -> None:
    assert {"tiny", "smollm2.yaml"} < files().keys()
    assert any(name.startswith("configuration.md:") for name in files())


def test_the_schema_takes_the_whole_config_of_a_run() -> None:
    for preset in presets():
        assert refused(resolve(preset).config.model_dump(mode="json")) == []


@pytest.mark.parametrize(
    "content",
    [
        {"trian": {}},
        {"train": {"lr": 0}},
        {"train": {"lr": "1e-5"}},
        {"train": {"epochs": 1.5}},
        {"train": {"surrogate": "clop"}},
        {"train": {"optimizer": "lion"}},
        {"train": {"loss": "mine"}},
        {"train": {"nothing": 1}},
        {"model": {"device": "gpu"}},
        {"model": {"lora": {"rank": -1}}},
        {"model": {"lora": {"targets": []}}},
        {"data": {"task": "chess"}},
        {"data": {"sat": {"difficulty": [0.1, 0.2, 0.3]}}},
        {"data": {"mix": {"sat": 0}}},
        {"eval": {"ks": []}},
        {"eval": {"greedy": 1}},
        {"resume": "0123456789abcdef0123456789abcdef"},
    ],
    ids=str,
)
def test_the_schema_refuses_what_the_config_refuses(content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text(yaml12.dump({"base": "tiny", **content}))
    with pytest.raises(ConfigError):
        resolve(str(tmp_path / "wrong.yaml"))
    assert refused(content)


@pytest.mark.parametrize("preset", presets())
def test_presets_point_editors_at_the_schema(preset: str) -> None:
    path = ROOT / f"grpo_mlflow/presets/{preset}.yaml"
    start, _, where = path.read_text().splitlines()[0].partition("$schema=")
    assert start == "# yaml-language-server: "
    assert (path.parent / where).resolve() == json_schema.PATH
