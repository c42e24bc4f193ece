"""Files of reward functions in TRL's form, unchanged, give the values that TRL 1.16.0 gives for the same completions.

The expected ones were worked out by its own code (GRPOTrainer._calculate_rewards). TRL's numbers are 32-bit floats.
"""

from __future__ import annotations

from typing import Any

import pytest

from grpo_mlflow.types import Problem
from tests.support.paths import ROOT
from tests.support.rewarded import problem, rewards_of, values

FILES = ROOT / "tests" / "support" / "reward_files"
NA: float | None = None  # does not apply
PLAIN: list[tuple[Problem, list[str]]] = [
    (problem("1 + 1 =", answer="2", level=1), ["2", " 2 ", "two", "3"]),
    (problem("7 * 8 =", answer="56", level=None), ["56", "", "15", "56 "]),
    (problem("9 - 4 =", answer=5, level=3), ["5", "5", "4", "x5"]),
]
KIND = {"role": "system", "content": "Be kind."}
CHAT: list[tuple[Problem, list[str]]] = [
    (
        problem(
            [KIND, {"role": "user", "content": "tea or coffee"}], meta={"worth": 0.5, "tags": ["a"]}, solution="tea"
        ),
        ["tea please", "coffee", "Tea", "please, tea"],
    ),
    (
        problem([KIND, {"role": "user", "content": "cat or dog"}], meta=None, solution="dog"),
        ["dog", "cat please", "", "PLEASE cat"],
    ),
]
TRL: list[tuple[str, list[tuple[Problem, list[str]]], dict[str, list[float | None]]]] = [
    (
        "plain",
        PLAIN,
        {
            "right": [1, 1, 0, 0, 1, 0, 0, 1, 1, 1, 0, 0],
            "short": [0.2, 0.4, 0.4, 0.2, 0.3, 0.1, 0.3, 0.4, 0.2, 0.2, 0.2, 0.3],
            "digits": [1, 1, 0, 1, NA, NA, NA, NA, NA, NA, NA, NA],
        },
    ),
    (
        "waiting",
        PLAIN,
        {
            "near": [1, 0.5, 0.5, 1, 1, 0.5, 1, 0.6666667, 1, 1, 1, 0.6666667],
            "even": [0, 0, 0, 0, 1, NA, 1, 0, 0, 0, 0, 1],
            "same": [*[0.0833333] * 8, *[0.1666667] * 2, *[0.0833333] * 2],
        },
    ),
    (
        "chat",
        CHAT,
        {
            "polite": [1, 0, 0, 1, 0, 1, 0, 1],
            "matches": [0.5, 0, 0, 0.5, NA, NA, NA, NA],
            "asked": [1, 0, 0, 1, 0, 1, 0, 1],
        },
    ),
]


@pytest.mark.parametrize(("file", "rows", "expected"), TRL, ids=[file for file, NA, _ in TRL])
def test_a_file_in_trls_form_gives_what_trl_gives(
    file: str, rows: list[tuple[Problem, list[str]]], expected: dict[str, list[float | None]]
) -> None:
    named: dict[str, Any] = {f"python:{FILES / file}.py:{name}": 1.0 for name in expected}
    made = rewards_of(named)
    problems = [each for each, texts in rows for _ in texts]
    texts = [text for NA, texts in rows for text in texts]
    found = made.begin(problems, texts, [range(len(text) + 1) for text in texts])()
    for name, wanted in expected.items():
        given = values(found, name)
        assert [value is None for value in given] == [value is None for value in wanted]
        numbers = [value for value in given if value is not None]
        assert numbers == pytest.approx([value for value in wanted if value is not None], abs=1e-6)
    if file == "plain":
        ((name, (total, count)),) = made.logged().items()
        assert (name, round(total, 5), count) == ("tokens", 2.66667, 1)


def test_a_module_is_found_where_python_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FILES))
    made = rewards_of({"right": {"use": "python:plain:right", "weight": 2}})
    (found,) = made.judge([PLAIN[0][0]], ["2"])
    assert (found.reward, found.parts, found.success) == (2.0, {"right": 2.0}, True)


def test_functions_of_one_file_share_a_process_and_options_are_keyword_arguments(tmp_path: Any) -> None:
    (tmp_path / "shared.py").write_text(
        "import os\ncalls = []\n"
        "def one(completions, **kwargs):\n    calls.append(1)\n    return [os.getpid()]\n"
        "def two(completions, times, **kwargs):\n    return [times * len(calls)]\n"
    )
    use = f"python:{tmp_path}/shared.py:"
    made = rewards_of({"one": {"use": f"{use}one"}, "two": {"use": f"{use}two", "times": 10}})
    counts = [values(made.judge([problem()], ["a"]), "two")[0] for _ in range(3)]
    assert counts == [10, 20, 30]


def test_the_state_of_the_trainer_is_the_iteration(tmp_path: Any) -> None:
    (tmp_path / "state.py").write_text(
        "def step(completions, trainer_state, **kwargs):\n"
        "    return [trainer_state.global_step / trainer_state.max_steps]\n"
    )
    made = rewards_of({f"python:{tmp_path}/state.py:step": 1})
    made.at(3, 12)
    assert made.judge([problem()], ["a"])[0].reward == 0.25
