"""Lines fit the terminal, and what people copy from it stays in one piece."""

from __future__ import annotations

import io

import pytest

from grpo_mlflow.runtime.folding import fitted, folded

LONG = "sqlite:////home/somebody/projects/reasoning/experiments/of/this/year/mlflow.db"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("short", ["short"]),
        ("", [""]),
        (
            "warning: iteration 0: 88% of the completions are cut off: raise generation.max_new_tokens",
            ["warning: iteration 0: 88% of the", "    completions are cut off: raise", "    generation.max_new_tokens"],
        ),
        (
            "best      0.000 at iteration 0 (the model before training)",
            ["best      0.000 at iteration 0 (the", "          model before training)"],
        ),
        (
            "ok      model       tiny, 0.0 M parameters, proven in 0.0s",
            [
                "ok      model       tiny, 0.0 M",
                "                    parameters, proven",
                "                    in 0.0s",
            ],
        ),
        (
            "eval    2  pass@1 0.100 [0.000, 0.206]  pass@4 0.200  reward 0.041",
            ["eval    2  pass@1 0.100 [0.000, 0.206]", "           pass@4 0.200  reward 0.041"],
        ),
        (
            "winner    trial 10: 0.1234 [0.000, 0.602] alone",
            ["winner    trial 10: 0.1234", "          [0.000, 0.602] alone"],
        ),
        (
            "settings  train.lr = 0.0004, train.epochs = 1",
            ["settings  train.lr = 0.0004,", "          train.epochs = 1"],
        ),
        (
            "open it   mlflow ui --backend-store-uri sqlite:////here/mlflow.db",
            ["open it", "  mlflow ui --backend-store-uri sqlite:////here/mlflow.db"],
        ),
        (
            "  grpo train resume=0123456789abcdef0123456789abcdef train.iterations=8",
            ["  grpo train resume=0123456789abcdef0123456789abcdef train.iterations=8"],
        ),
        (
            "error: train.lr: one run takes one value; to try all: grpo optimize --space 'train.lr=[1,2]'",
            [
                "error: train.lr: one run takes one",
                "    value; to try all:",
                "  grpo optimize --space 'train.lr=[1,2]'",
            ],
        ),
        (
            "MLflow lacks it; `grpo upload --folder outputs` sends it",
            ["MLflow lacks it;", "    `grpo upload --folder outputs` sends", "    it"],
        ),
        (f"files     {LONG}", ["files", f"  {LONG}"]),
        (f"the store is at {LONG} today", ["the store is at", f"    {LONG}", "    today"]),
    ],
)
def test_a_line_of_forty_columns(line: str, expected: list[str]) -> None:
    assert folded(line, 40).split("\n") == expected


@pytest.mark.parametrize("columns", [20, 33, 47, 80])
def test_nothing_is_lost_and_nothing_is_too_long(columns: int) -> None:
    text = "one two   three\n\n  four: " + "five " * 40 + "\nlabel     " + "six  " * 30 + "end"
    done = folded(text, columns)
    assert done.split() == text.split()
    assert max(map(len, done.split("\n"))) <= columns
    assert folded(done, 80) == done, "what fits stays"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        raise OSError("it does not tell how wide it is")


def test_only_a_terminal_gets_short_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "word " * 30
    monkeypatch.delenv("COLUMNS", raising=False)
    assert fitted(line, io.StringIO()) == fitted(line, Terminal()) == line
    monkeypatch.setenv("COLUMNS", "30")
    assert max(map(len, fitted(line, Terminal()).split("\n"))) <= 30
    assert fitted(line, io.StringIO()) == line
    monkeypatch.setenv("COLUMNS", "wide")
    assert fitted(line, Terminal()) == line
