"""Config files that are made to cost time: refused at once, in few lines."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from grpo_mlflow.config import resolve, yaml12
from grpo_mlflow.errors import ConfigError


def bomb(levels: int, merge: bool = False) -> str:
    lines = ["a0: &a0 {x: 1}" if merge else "a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for level in range(1, levels):
        nine = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"a{level}: &a{level} " + (f"{{<<: [{nine}]}}" if merge else f"[{nine}]"))
    return "\n".join(lines) + "\n"


HOSTILE = {
    "an alias bomb": bomb(9),
    "an alias bomb of mappings": bomb(9, merge=True),
    "an alias bomb in a setting": f"data:\n  settings: {{b: {{{', '.join(bomb(9).splitlines())}}}}}\n",
    "an alias of itself": "train: &a {lr: *a}\n",
    "a list in itself": "eval: {ks: &a [1, *a]}\n",
    "20,000 unknown keys": "".join(f"train_{i}.lrr: 1\n" for i in range(20_000)),
    "20,000 unknown keys of a section": "train:\n" + "".join(f"  lr{i}: 1\n" for i in range(20_000)),
    "9,000 unknown keys": "generation: {backend: local}\n" + "".join(f"train_{i}.lrr: 1\n" for i in range(9000)),
    "20,000 times the same key": "seed: 1\n" * 20_000,
    "deep nesting": "train: " + "{a: " * 5000 + "1" + "}" * 5000,
    "a key that is a list": "[1, 2]: 3\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_it_ends_at_once(name: str, tmp_path: Path) -> None:
    (tmp_path / "hostile.yaml").write_text(HOSTILE[name])
    began = time.process_time()
    with pytest.raises(ConfigError) as caught:
        resolve(str(tmp_path / "hostile.yaml"))
    assert time.process_time() - began < 10  # the text itself takes seconds to parse; it took minutes
    assert len(str(caught.value).splitlines()) <= 21
    assert len(str(caught.value)) < 50_000


def test_unknown_keys_that_are_not_shown_are_counted(tmp_path: Path) -> None:
    (tmp_path / "many.yaml").write_text("".join(f"nothing{i}: 1\n" for i in range(30)))
    with pytest.raises(ConfigError, match="and 10 further unknown keys"):
        resolve(str(tmp_path / "many.yaml"))


def test_anchors_that_save_a_few_lines_are_taken() -> None:
    text = "base: &b {x: 1, y: [1, 2]}\none: *b\ntwo: {b: *b, z: 3}\n"
    found = yaml12.load(text, "here")
    assert found["one"] == found["base"]
    assert found["two"] == {"b": found["base"], "z": 3}


@pytest.mark.parametrize(
    "text",
    [
        "!!int x",
        "!!float x",
        "!!bool x",
        "!!map x",
        "!!seq x",
        "!!timestamp 1",
        "!!set {a}",
        "!!binary aa",
        "!!merge x",
    ],
)
def test_a_tag_that_does_not_fit_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"here, line 1: not valid YAML: .+"):
        yaml12.load(text, "here")


def test_a_tag_that_fits_is_taken() -> None:
    assert yaml12.load("[!!int '5', !!float 1, !!bool true, !!str 1, !!null x]", "here") == [5, 1.0, True, "1", None]
