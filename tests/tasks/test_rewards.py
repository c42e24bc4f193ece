"""Built-in rewards, what a config may say of rewards, and functions that are of no use: one line each."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from grpo_mlflow.config import resolve
from grpo_mlflow.errors import ConfigError, UserError
from grpo_mlflow.tasks import rewards
from grpo_mlflow.types import Problem
from tests.support.rewarded import problem, rewards_of, values

SUM = problem("1 + 1 =", answer="2")


def given(use: str, text: str, row: Problem = SUM, /, **options: Any) -> float | None:
    made = rewards_of({"it": {"use": use, **options}})
    return values(made.begin([row], [text], [(1, 2, 3)])(), "it")[0]


@pytest.mark.parametrize(
    ("text", "answer", "value"),
    [
        ("2", "2", 1),
        (" two  Words\n", "Two words", 1),
        ("It is <SOLUTION> 2 </SOLUTION>.", "2", 1),
        ("<SOLUTION>2</SOLUTION><SOLUTION>2</SOLUTION>", "2", 0),
        ("It is 2", "2", 0),
        ("", "2", 0),
        ("3", 3.0, 1),
        ("b", ["a", "b"], 1),
        ("2", None, None),
    ],
)
def test_exact(text: str, answer: Any, value: float | None) -> None:
    assert given("exact", text, problem(answer=answer)) == value


@pytest.mark.parametrize(
    ("use", "text", "options", "value"),
    [
        ("contains", "I say  Two\nwords here", {"text": "two WORDS"}, 1),
        ("contains", "so 2", {}, 1),
        ("contains", "so 3", {}, 0),
        ("number", "the answer is 2.0", {}, 1),
        ("number", "2 or 3", {}, 0),
        ("tags", "<SOLUTION>x</SOLUTION>", {}, 1),
        ("tags", "<SOLUTION> </SOLUTION>", {}, 0),
        ("tags", "<think>a</think> b <answer>c</answer>", {"names": ["think", "answer"]}, 1),
        ("tags", "<answer>c</answer><think>a</think>", {"names": ["think", "answer"]}, 0),
        ("tags", "<think>a</think><answer>c</answer></answer>", {"names": ["think", "answer"]}, 0),
        ("length", "a b c", {"at_most": 3}, 1),
        ("length", "a b c d", {"at_most": 3}, 2 - 4 / 3),
        ("length", "a b c d e f g", {"at_most": 3}, 0),
        ("length", "a", {"at_least": 4}, 0.25),
        ("length", "abcd", {"at_least": 2, "at_most": 4, "unit": "characters"}, 1),
        ("length", "whatever", {"at_most": 2, "unit": "tokens"}, 0.5),
        ("regex", "say 12!", {"pattern": r"\d+"}, 1),
        ("regex", "say 12!", {"pattern": r"\d+", "full": True}, 0),
        ("regex", " 12\n", {"pattern": r"\d+", "full": True}, 1),
    ],
)
def test_what_is_built_in(use: str, text: str, options: dict[str, Any], value: float) -> None:
    assert given(use, text, **options) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [('{"a": 1}', 1), ('{"a": "x"}', 0), ('Here:\n```json\n{"a": 2}\n```\nThat is it.', 1), ("{", 0), ("[" * 9000, 0)],
)
def test_json_by_a_schema(text: str, value: float) -> None:
    pytest.importorskip("jsonschema")
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    assert given("json_schema", text, schema=schema) == value


@pytest.mark.parametrize(
    ("text", "answer", "value"),
    [
        ("So it is $\\frac{1}{2}$.", "0.5", 1),
        ("\\boxed{x^2 + 2x + 1}", "(x+1)^2", 1),
        ("<SOLUTION>2x</SOLUTION>", "x + x", 1),
        ("$3$", "2", 0),
        ("no idea", "2", 0),
        ("$9^{9^{9^{9}}}$", "2", 0),
        ("2", None, None),
    ],
)
def test_mathematics(text: str, answer: str | None, value: float | None) -> None:
    pytest.importorskip("math_verify")
    assert given("math", text, problem(answer=answer)) == value


ALLOWED = "exact, contains, number, math, regex, json_schema, tags, length, judge, or python:MODULE:FUNCTION"
JUDGE = {"use": "judge", "base_url": "http://127.0.0.1:9", "model": "m", "rubric": "{completion}"}


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ({"a": {"use": "exakt"}}, f"data.rewards.a: use = 'exakt'; allowed: {ALLOWED}"),
        ({"a": 1}, f"data.rewards.a: use = 'a'; allowed: {ALLOWED}"),
        ({"exact": "1"}, "data.rewards.exact = '1': allowed: a weight, or {use: NAME, weight: 1, OPTIONS}"),
        ({"exact": True}, "data.rewards.exact: weight = True; allowed: a finite number"),
        ({"exact": {"weight": "much"}}, "data.rewards.exact: weight = 'much'; allowed: a finite number"),
        ({"exact": {"size": 1}}, "data.rewards.exact: exact has no option 'size'; allowed: weight"),
        ({"a b": {"use": "exact"}}, "data.rewards: 'a b' is no name; allowed: letters, digits, _ and -"),
        ({"mean": {"use": "exact"}}, "data.rewards.mean: train/reward_mean is another metric; allowed: another name"),
        ({"exact": 1, "exact_std": {"use": "exact"}}, "data.rewards.exact_std: train/reward_exact_std is another"),
        ({"python:a.py:f": 1, "f": {"use": "exact"}}, "data.rewards: two rewards are called f"),
        ({"tags": {"names": "think"}}, "data.rewards.tags: names = 'think'; allowed: a list of names"),
        ({"length": 1}, "data.rewards.length: has neither at_most nor at_least; allowed: one of them, or both"),
        ({"length": {"at_most": 0}}, "data.rewards.length: at_most = 0; allowed: 1 or more"),
        ({"length": {"at_most": 2, "at_least": 3}}, "data.rewards.length: at_least = 3 is more than at_most = 2"),
        ({"regex": 1}, "data.rewards.regex: "),
        ({"regex": {"pattern": "("}}, "data.rewards.regex: pattern = '(': missing )"),
        ({"a": {"use": "judge"}}, "data.rewards.a: "),
        ({"a": {**JUDGE, "rubric": "Good?"}}, "data.rewards.a: rubric: does not name {completion}"),
        ({"a": {**JUDGE, "scale": [5, 1]}}, "data.rewards.a: scale = [5, 1]; allowed: [LOW, HIGH]"),
        ({"a": {**JUDGE, "base_url": "127.0.0.1"}}, "data.rewards.a: base_url = '127.0.0.1'; allowed: http://HOST"),
        ({"a": {**JUDGE, "concurrency": 0}}, "data.rewards.a: concurrency = 0; allowed: 1 or more"),
        ({"a": {**JUDGE, "price": 3}}, "data.rewards.a: price = 3; allowed: [OF PROMPTS, OF ANSWERS]"),
        ({"a": {**JUDGE, "timeout": 0}}, "data.rewards.a: timeout = 0; allowed: seconds, or null"),
    ],
)
def test_a_wrong_entry_is_one_line(named: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rewards_of(named)
    assert str(caught.value).startswith(told)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["data.rewards={exact: 1}"], "data.rewards = {exact}: data.task = 'arithmetic' judges by itself"),
        (["train.multi_objective_aggregation=normalize_then_sum"], "there is one reward"),
        (["data.task=rows", "data.rows.path=.", "data.success=exact"], "there are no data.rewards"),
        (["data.task=rows", "data.rows.path=.", "data.rewards={exact: 1}", "train.reward_weights.tags=2"], "'tags'"),
    ],
)
def test_rewards_where_they_cannot_act_are_refused(overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        resolve("tiny", overrides)


def test_what_counts_as_success() -> None:
    def success(text: str, *said: str) -> bool:
        named = {"exact": 1, "tags": 0.5, "length": {"at_least": 2, "weight": 0}}
        return rewards_of(named, None, *said).judge([SUM], [text])[0].success

    assert success("2")
    assert not success("<SOLUTION>3</SOLUTION>")
    assert success("<SOLUTION>3</SOLUTION>", "data.success=tags")
    assert success("one", "data.success={name: length, at_least: 0.5}")
    assert not success("one", "data.success={name: length}")
    assert success("is 2", "data.success={use: number}")
    with pytest.raises(ConfigError, match="names no reward; allowed: one of exact, tags"):
        success("2", "data.success=number")


def test_what_only_success_is_judged_by_is_no_reward() -> None:
    (found,) = rewards_of({"tags": 0.5}, None, "data.success={use: exact}").judge([SUM], ["<SOLUTION>2</SOLUTION>"])
    assert (found.reward, found.parts, found.success) == (0.5, {"tags": 0.5}, True)
    assert found.values == {"tags": 1.0}


def test_the_range_of_rewards_follows_their_weights() -> None:
    named = {"exact": 1, "tags": -0.5, "length": {"at_most": 2, "weight": 0.25}}
    assert rewards_of(named).reward_range == (-0.5, 1.25)


BAD: list[tuple[str, str]] = [
    ("def f(completions, **k): return [1 / len(c) for c in completions]", "raised ZeroDivisionError: division by zero"),
    ("def f(completions, **k): return [1.0]", "gave 1 values for 2 completions; allowed: one for each"),
    ("def f(completions, **k): return [0, 1, 2]", "gave 3 values for 2 completions"),
    ("def f(completions, **k): return [1.0, float('nan')]", "gave nan; allowed: a finite number, or None"),
    ("def f(completions, **k): return [1.0, float('inf')]", "gave inf; allowed: a finite number"),
    ("def f(completions, **k): return [1.0, '1']", "gave '1'; allowed: a finite number"),
    ("def f(completions, **k): return [1.0, []]", "gave []; allowed: a finite number"),
    ("def f(completions, **k): return None", "gave None; allowed: a list of 2 numbers"),
    ("def f(completions, **k): return 1.0", "gave 1.0; allowed: a list of 2 numbers"),
    ("def f(completions, **k): return 'ab'", "gave 'ab'; allowed: a list of 2 numbers"),
    ("def f(completions, **k): return {0: 1, 1: 1}", "gave {0: 1, 1: 1}; allowed: a list of 2 numbers"),
    ("async def g(): return [0, 0]\ndef f(completions, **k): return g()", "gave a coroutine, which nobody awaits"),
    ("def f(completions): return [1, 1]", "does not take prompts, completion_ids, answer, trainer_state, log_extra"),
    ("def f(completions, gold, **k): return [1, 1]", "asks for gold, which the rows do not have; there are prompts"),
    ("import sys\ndef f(completions, **k): sys.exit(3)", "raised SystemExit: 3"),
    ("import os\ndef f(completions, **k): os._exit(3)", "ended its process: exit code 3"),
    ("import os, signal\ndef f(**k): os.kill(os.getpid(), signal.SIGKILL)", "ended its process: signal SIGKILL"),
    ("def f(**k): return f(**k)", "raised RecursionError: maximum recursion depth exceeded"),
    ("def f(**k):\n    while True: pass", "does not end within 0.2 s (data.reward_timeout), 3 times"),
    ("import asyncio\nasync def f(**k): await asyncio.sleep(60)", "does not end within 0.2 s (data.reward_timeout), 3"),
    ("async def f(completions, **k): raise KeyError('lost')", "raised KeyError: 'lost'"),
    ("async def f(completions, **k): raise SystemExit(2)", "raised SystemExit: 2"),
    ("class E(Exception):\n    def __str__(self): raise ValueError\ndef f(**k): raise E", "raised E"),
    ("def f(**k): raise KeyboardInterrupt", "raised KeyboardInterrupt"),
    ("def f(**k): return [0.0] * 10 ** 12", "raised MemoryError"),
]


@pytest.mark.parametrize(("source", "told"), BAD, ids=[told[:30] for _, told in BAD])
def test_a_function_of_no_use_is_one_line_with_the_text_in_a_file(source: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(source)
    limit = "data.reward_timeout=" + ("0.2" if "does not end" in told else "20")
    made = rewards_of({f"python:{tmp_path}/bad.py:f": 1}, tmp_path, limit)
    with pytest.raises(UserError) as caught:
        made.judge([problem(seed=3, answer="2"), problem(seed=4, answer="2")], ["text", ""])
    line = str(caught.value)
    assert line.startswith(f"data.rewards.f: function f ({tmp_path}/bad.py, line ")
    assert told in line
    assert "\n" not in line
    assert caught.value.exit_code == 1
    kept = Path(line.rpartition("; the text is in ")[2])
    whole = kept.parent == tmp_path / "unjudged" and kept.read_text()
    if "division" in told or "finite" in told:
        assert "for problem 'rows/train/4' (seed 4)" in line
        assert whole == ""
    elif "batch" in line:
        assert whole == '"text"\n""'
        assert "for a batch of 2, which begins with problem 'rows/train/3' (seed 3)" in line
    else:
        assert whole == "text"


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("def g(): pass", "has no function f"),
        ("f = 1", "has no function f"),
        ("import nothing_of_this_name", "raised ModuleNotFoundError: No module named 'nothing_of_this_name' ("),
        ("def f(:", "raised SyntaxError: "),
        ("import sys; sys.exit(1)", "raised SystemExit: 1"),
        ("import os; os._exit(7)", "cannot be imported: exit code 7"),
        ("raise RuntimeError('two\\nlines')", "raised RuntimeError: two lines ("),
    ],
)
def test_a_file_that_cannot_be_imported_is_refused_at_once(source: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(source)
    with pytest.raises(ConfigError) as caught:
        rewards_of({f"python:{tmp_path}/bad.py:f": 1})
    assert str(caught.value).startswith(f"data.rewards.f: use = 'python:{tmp_path}/bad.py:f': ")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.py: no such file"):
        rewards_of({"python:nowhere.py:f": 1})


def test_after_a_call_that_took_too_long_the_next_one_counts(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import pathlib, time\nmark = pathlib.Path(__file__).with_name('mark')\n"
        "def f(completions, **k):\n"
        "    if not mark.exists():\n        mark.touch()\n        time.sleep(60)\n"
        "    return [1.0] * len(completions)\n"
        "def g(completions, **k): return [2.0] * len(completions)\n"
    )
    use = f"python:{tmp_path}/slow.py"
    made = rewards_of({f"{use}:f": 1, f"{use}:g": 1}, tmp_path, "data.reward_timeout=1.5")
    (found,) = made.judge([SUM], ["a"])
    assert found.parts == {"f": 1.0, "g": 2.0}


def test_a_pattern_that_does_not_end_on_a_text_is_one_line(tmp_path: Path) -> None:
    made = rewards_of({"regex": {"pattern": "(a+)+b"}}, tmp_path, "data.reward_timeout=0.2")
    with pytest.raises(
        UserError, match=r"data\.rewards\.regex: regex does not end within 0\.2 s .* for problem 'rows/"
    ):
        made.judge([SUM], ["a" * 60])


def test_a_column_of_a_name_that_functions_get_otherwise_is_refused(tmp_path: Path) -> None:
    (tmp_path / "any.py").write_text("def f(completions, **k): return [1.0] * len(completions)")
    made = rewards_of({f"python:{tmp_path}/any.py:f": 1})
    with pytest.raises(ConfigError, match="the rows have a column completions, which functions get otherwise"):
        made.require_fit(["prompt", "completions"], answers=True)


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ({"exact": 1}, "data.rewards.exact: exact needs the right answer; the rows have prompt, level"),
        ({"number": 1}, "data.rewards.number: number needs the right answer"),
        ({"contains": 1}, "data.rewards.contains: contains needs the right answer"),
        (
            {"a": {**JUDGE, "rubric": "{qestion} {completion}"}},
            "data.rewards.a: rubric: there is no column 'qestion'; the rows have prompt, level",
        ),
        ({"a": {**JUDGE, "rubric": "{answer} {completion}"}}, "data.rewards.a: rubric: there is no column 'answer'"),
        ({"a": {"use": "python:any.py:f", "level": 2}}, "data.rewards.a: level is an option and a column of the rows"),
    ],
)
def test_a_reward_that_could_never_apply_to_these_rows_is_refused(
    named: dict[str, Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("any.py").write_text("def f(completions, **k): return [1.0] * len(completions)")
    with pytest.raises(ConfigError) as caught:
        rewards_of(named).require_fit(["prompt", "level"], answers=False)
    assert str(caught.value).startswith(told)


@pytest.mark.parametrize(
    "named",
    [
        {"contains": {"text": "a"}},
        {"tags": 1},
        {"a": {**JUDGE, "rubric": "{question} {level} {completion}"}},
    ],
)
def test_a_reward_that_needs_no_answer_is_taken_without(named: dict[str, Any]) -> None:
    rewards_of(named).require_fit(["prompt", "level"], answers=False)


def test_a_reward_called_success_stays_the_reward() -> None:
    named = {"success": {"use": "contains", "text": "abc"}}
    (found,) = rewards_of(named, None, "data.success={use: exact}").judge([SUM], ["abc def"])
    assert (found.reward, dict(found.parts), found.success) == (1.0, {"success": 1.0}, False)


def test_what_a_slow_function_raises_is_told_though_looking_for_the_sample_takes_too_long(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time\ndef f(completions, **k):\n    time.sleep(0.6)\n    assert len(completions) < 2, 'too many'\n"
        "    time.sleep(60)\n"
    )
    made = rewards_of({f"python:{tmp_path}/slow.py:f": 1}, tmp_path, "data.reward_timeout=1")
    with pytest.raises(UserError, match="raised AssertionError: too many for a batch of 2"):
        made.judge([SUM, SUM], ["a", "b"])


def test_what_a_function_has_started_ends_with_the_run(tmp_path: Path) -> None:
    (tmp_path / "child.py").write_text(
        "import pathlib, subprocess\ndef f(completions, **k):\n    child = subprocess.Popen(['sleep', '300'])\n"
        "    pathlib.Path(__file__).with_name('pid').write_text(str(child.pid))\n    return [1.0] * len(completions)\n"
    )
    program = (
        "import os\nfrom tests.support.rewarded import problem, rewards_of\n"
        f"rewards_of({{'python:{tmp_path}/child.py:f': 1}}).judge([problem()], ['a'])\nos.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=False)
    started = int((tmp_path / "pid").read_text())
    until = time.monotonic() + 30
    while psutil.pid_exists(started) and psutil.Process(started).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.05)


def test_an_answer_that_holds_no_number_is_the_rows_fault(tmp_path: Path) -> None:
    made = rewards_of({"number": 1}, tmp_path)
    with pytest.raises(UserError, match=r"number the answer 'two' holds no single number for problem 'rows/train/9'"):
        made.judge([problem(seed=9, answer="two")], ["2"])


def test_what_waits_in_one_process_waits_at_once(tmp_path: Path) -> None:
    """Async functions of one file overlap each other and the functions of another."""
    (tmp_path / "one.py").write_text(
        "import asyncio, time\n"
        + "".join(
            f"async def f{n}(completions, **k):\n    start = time.time()\n    await asyncio.sleep(0.3)\n"
            "    return [start] * len(completions)\n"
            for n in range(3)
        )
    )
    (tmp_path / "two.py").write_text(
        "import time\ndef g(completions, **k):\n    start = time.time()\n    time.sleep(0.3)\n"
        "    return [start] * len(completions)\n"
    )
    named = {f"python:{tmp_path}/one.py:f{n}": 1.0 for n in range(3)} | {f"python:{tmp_path}/two.py:g": 1.0}
    start = time.time()
    (found,) = rewards_of(named).judge([SUM], ["a"])
    begun = [value for value in (found.values or {}).values() if value is not None]
    assert max(begun) - min(begun) < 0.3
    assert min(begun) >= start


def test_no_rewards_are_the_answer_alone() -> None:
    assert rewards.create(resolve("tiny", ["data.task=rows", "data.rows.path=."]).config, None) is None
