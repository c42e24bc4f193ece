"""Secrets are known by where they stand, and then found wherever they turn up."""

from __future__ import annotations

import json
import shlex
from typing import Any
from urllib.parse import quote, quote_plus

import pytest

from grpo_mlflow import redaction
from grpo_mlflow.config import dump, resolve
from grpo_mlflow.errors import ConfigError
from grpo_mlflow.redaction import redact

PLACES: dict[str, tuple[str, Any]] = {
    "password": ("tracking.uri", "postgresql://me:{}@host/db"),
    "with a query": ("tracking.uri", "postgresql://me:{}@host/db?sslmode=require"),
    "token as the user": ("generation.base_url", "http://{}@host:1"),
    "query": ("generation.base_url", "http://host:1/?api_key={}"),
    "token in a query": ("tracking.uri", "http://host/?a=1&token={}"),
    "password in a query": ("search.storage", "postgresql://host/db?password={}"),
    "path": ("generation.base_url", "https://gateway/{}/v1"),
    "option": ("generation.server.arguments", ["--max-num-seqs", "4", "--api-key", "{}"]),
    "option with =": ("generation.server.arguments", ["--hf-token={}"]),
    "setting": ("data.settings", {"api_key": "{}"}),
    "nested setting": ("data.settings", {"judge": {"password": "{}"}}),
    "mistyped": ("generation.api_key", "{}"),
}


def placed(value: Any, secret: str) -> Any:
    if isinstance(value, str):
        return value.replace("{}", secret)
    if isinstance(value, dict):
        return {key: placed(inner, secret) for key, inner in value.items()}
    return [placed(inner, secret) for inner in value]


@pytest.mark.parametrize("place", PLACES)
def test_a_secret_is_known_by_its_place(place: str) -> None:
    secret = f"x7Kq{place.replace(' ', '').replace('=', '')}0Lm9Zt4Rw2"
    key, value = PLACES[place]
    redaction.learn_from(key, placed(value, secret))
    assert secret not in redact(f"alone {secret}, in <{secret}>, x{secret}x, \\n{secret}")


@pytest.mark.parametrize(
    "secret",
    ["pa'ss wörd0", 'pa"ss\\word1', "p@ss:w/rd2", "p%40ss%3Aword3", "  two  spaces4", "ünïcode-päss5", "a+b&c=d6"],
)
def test_it_is_found_however_it_is_spelled(secret: str) -> None:
    redaction.learn_from("tracking.uri", f"postgresql://me:{secret}@host/db")
    secret = secret.strip()
    for spelled in (quote(secret), quote(secret, safe=""), quote_plus(secret), repr(secret), json.dumps(secret)):
        assert spelled.strip("'\"") not in redact(f"it says {spelled} here")
    for shown in (shlex.quote(secret), f"uri: '{secret.replace(chr(39), chr(39) * 2)}'", f"error at {secret}"):
        assert secret not in redact(shown)
        assert "***" in redact(shown)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("data.settings", {"eos_token": "</sentence>"}, "ends with </sentence>"),
        ("data.settings", {"key": "question", "max_tokens": 4000}, "the question of 4000"),
        ("generation.base_url", "http://host:8000/models/my-model-of-last-week/v1", "my-model-of-last-week"),
        ("tracking.uri", "sqlite:////tmp/a1b2c3d4e5f6a1b2c3d4e5f6/mlflow.db", "a1b2c3d4e5f6a1b2c3d4e5f6"),
        ("generation.server.arguments", ["--api-key", "--max-num-seqs", "4000"], "--max-num-seqs 4000"),
        ("tracking.uri", "postgresql://me:grpo@host/db", "grpo_mlflow learns"),
    ],
)
def test_what_is_no_secret_stays(name: str, value: Any, text: str) -> None:
    redaction.learn_from(name, value)
    assert redact(text) == text


def test_a_word_is_hidden_where_it_stands_and_nowhere_else() -> None:
    """A password that is a word of a config would take that word out of it."""
    content = {"data": {"settings": {"api_key": "sesame", "level": "easy"}}, "method": "sesame"}
    redaction.learn_from("data.settings", content["data"])
    assert redaction.without(content) == {**content, "data": {"settings": {"api_key": "***", "level": "easy"}}}
    assert redaction.without(["--api-key", "sesame", "sesame"]) == ["--api-key", "***", "sesame"]
    assert redaction.without(["--api-key", "--level", "5"]) == ["--api-key", "--level", "5"]


def test_the_environment_is_known_too() -> None:
    names = ("OPENAI_API_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD")
    given = {name: f"planted-{name}-8fK2" for name in names} | {"https_proxy": "http://me:planted-proxy-8fK2@proxy:1"}
    redaction.learn_environment(given)
    shown = redact(" ".join(given.values()))
    assert "planted" not in shown
    assert "SSH_AUTH_SOCK" not in shown


def test_a_reference_is_read_and_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED_PW", "s3cr3t-0f-a-reference")
    word = "tracking.uri=postgresql://me:${ENV:PLANTED_PW}@host/db"
    found = resolve("tiny", [word])
    assert found.config.tracking.uri == "postgresql://me:s3cr3t-0f-a-reference@host/db"
    assert "uri: postgresql://me:${ENV:PLANTED_PW}@host/db\n" in dump(found.config)
    assert redact(str(found.config.tracking.uri)) == "postgresql://me:${ENV:PLANTED_PW}@host/db"


def test_a_stored_config_with_references_is_one_to_start_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("PLANTED_KEY", "another-s3cr3t-value")
    words = [
        "data.settings={api_key: '${ENV:PLANTED_KEY}'}",
        "generation.server.arguments=[--api-key, '${ENV:PLANTED_KEY}']",
    ]
    first = resolve("tiny", words).config
    (tmp_path / "resolved.yaml").write_text(dump(first))
    assert "another-s3cr3t" not in (tmp_path / "resolved.yaml").read_text()
    assert resolve(str(tmp_path / "resolved.yaml")).config == first
    monkeypatch.delenv("PLANTED_KEY")
    with pytest.raises(ConfigError, match="the environment variable PLANTED_KEY is not set"):
        resolve(str(tmp_path / "resolved.yaml"))


def test_a_stored_config_without_its_secret_is_refused_with_the_way_out(tmp_path: Any) -> None:
    (tmp_path / "resolved.yaml").write_text(
        dump(resolve("tiny", ["tracking.uri=postgresql://me:planted-9Qx@h/d"]).config)
    )
    with pytest.raises(ConfigError, match=r"tracking\.uri = .*\*\*\* stands for a secret .*\$\{ENV:NAME\}"):
        resolve(str(tmp_path / "resolved.yaml"))


@pytest.mark.parametrize(
    "word",
    [
        "trackng.uri=postgresql://me:planted-Q1@h/d",
        "generation.api_key=planted-Q1",
        "generation.server.arguments=[--api-key, planted-Q1",
        "data.settings={api_key: planted-Q1",
        "data.setings={api_key: planted-Q1}",
        "train.iterations=planted://u:planted-Q1@h",
        "token planted-Q1",
        "api_key=12345678",
    ],
)
def test_a_mistake_does_not_show_what_it_was_made_with(word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve("tiny", [word])
    assert "planted-Q1" not in str(caught.value)
    assert "12345678" not in str(caught.value)
