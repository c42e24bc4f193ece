"""Every generator of reasoning-gym: its own answer succeeds, nothing else does, and no judge runs a text as code."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from grpo_mlflow.config import resolve
from grpo_mlflow.errors import ConfigError
from grpo_mlflow.runtime.interrupts import Interrupted, handled
from grpo_mlflow.tasks import contents, create
from grpo_mlflow.tasks.gym import HASHED, ReasoningGym, generators
from grpo_mlflow.tasks.judges import JUDGES
from grpo_mlflow.training.rollouts import judge
from grpo_mlflow.types import Completion, Problem, Prompt, Split
from tests.support.paths import ROOT
from tests.support.signals import count_lines, send_at
from tests.support.timing import quick

pytest.importorskip("reasoning_gym", reason="the extra `tasks` is not installed")
factory = importlib.import_module("reasoning_gym.factory")
GENERATORS = generators()

# What cannot be strict, as docs/tasks.md lists it: the package's judge passes a right answer among other words, or a
# number that is off in its last digit.
PASSES_WORDS = {
    *("fraction_simplification", "kakurasu", "knights_knaves", "polynomial_equations", "sokoban", "survo"),
    "time_intervals",
}
PASSES_A_DIGIT = {"codeio", "coin_flip", "decimal_arithmetic", "number_format", "number_sorting", "power_function"}
SEVERAL_ANSWERS = {"cryptarithm", "graph_color"}  # another digit can be another right answer
# Generators without an answer of their own: judged like the others, but no demonstration can be made.
UNANSWERED = {"boxnet", "rush_hour"}
RANDOM = ["", "  ", "the answer is unknown", "<SOLUTION></SOLUTION>", "<SOLUTION>q8#zz</SOLUTION>", "banana", "?", "[}"]
BOMBS = [
    *(
        "1e999999999",
        "9" * 100_000,
        "(" * 100_000,
        "[[" * 5000,
        "9**9**9**9",
        "U999999999",
        "F+99999999",
        "P ∧ " * 3000,
    ),
    *("[0]*10**9", "1,2,3," * 5000, "sin(" * 200 + "x" + ")" * 200, "((x**100)**100)**100", "exp(exp(exp(99)))"),
]


@pytest.fixture(autouse=True)
def _fixed_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process the order of sets does not change, whatever the seed."""
    monkeypatch.setenv("PYTHONHASHSEED", "0")


def make(name: str, **settings: object) -> ReasoningGym:
    task = create(f"reasoning_gym/{name}", dict(settings))
    assert isinstance(task, ReasoningGym)
    return task


def other_digit(answer: str) -> str:
    """Return the answer with its last digit changed."""
    return re.sub(r"[0-9](?=[^0-9]*$)", lambda digit: str((int(digit[0]) + 1) % 10), answer)


def problems(task: ReasoningGym) -> list[Problem]:
    splits: tuple[tuple[Split, int], ...] = (("train", 0), ("train", 1), ("eval", 0))
    return [task.problem(split, seed) for split, seed in splits]


def test_all_generators_are_here() -> None:
    assert len(GENERATORS) >= 105
    assert set(GENERATORS) >= {*PASSES_WORDS, *PASSES_A_DIGIT, *SEVERAL_ANSWERS, *UNANSWERED, *HASHED, *JUDGES}


@pytest.mark.parametrize("name", GENERATORS)
def test_only_an_answer_succeeds(name: str) -> None:
    task = make(name)
    found = problems(task)
    assert [make(name).problem("train", 1), len({p.messages[0]["content"] for p in found})] == [found[1], 3]
    passed_words, passed_digit = False, False
    for problem in found:
        json.dumps(problem.payload)
        for text in (*RANDOM, *BOMBS):
            assert not quick(partial(task.verify, problem, text)).success, text[:40]
        if name in UNANSWERED:
            with pytest.raises(ConfigError, match="has no answers of its own"):
                task.reference_answer(problem)
            continue
        answer = task.reference_answer(problem)
        verdict = task.verify(problem, answer)
        assert verdict.success
        assert verdict.reward == pytest.approx(1.0)
        bare = answer.removeprefix("<SOLUTION>").removesuffix("</SOLUTION>")
        assert task.verify(problem, bare).reward == pytest.approx(0.9)
        assert not task.verify(problem, answer + answer).success
        for text in (f"{bare} or 12345, or banana", f"{bare}\nbanana", f"banana {bare}", f"{bare} {bare}"):
            passed_words |= task.verify(problem, text).success
        passed_digit |= re.search("[0-9]", bare) is not None and task.verify(problem, other_digit(bare)).success
    assert not passed_words or name in PASSES_WORDS
    assert not passed_digit or name in PASSES_A_DIGIT | SEVERAL_ANSWERS


def test_an_item_that_raises_is_drawn_again() -> None:
    """Of seeds 5000 to 5299, the draws of 5015 meet an item of maze that the package cannot make."""
    task = make("maze")
    problem = task.problem("eval", 5015)
    assert problem == make("maze").problem("eval", 5015)
    assert task.verify(problem, task.reference_answer(problem)).success


class Scripted:
    """A generator that cannot make the items whose seeds leave less than `broken` when divided by 4."""

    def __init__(self, config: ScriptedConfig) -> None:
        self.config = config

    def __getitem__(self, place: int) -> dict[str, object]:
        if self.config.seed % 4 < self.config.broken:
            raise RuntimeError("no cell\nfound")
        return {"question": f"{self.config.seed}?", "answer": str(self.config.seed), "metadata": {}}

    def score_answer(self, answer: str, entry: dict[str, object]) -> float:
        return float(answer == entry["answer"])


@dataclass
class ScriptedConfig:
    seed: int = 0
    size: int = 1
    broken: int = 0

    def validate(self) -> None:
        """Nothing is refused."""


@pytest.fixture
def scripted() -> Iterator[None]:
    factory.DATASETS["scripted"] = (Scripted, ScriptedConfig)
    yield
    del factory.DATASETS["scripted"]


@pytest.mark.usefixtures("scripted")
def test_items_that_raise_leave_the_others_as_they_are() -> None:
    sound, task = make("scripted"), make("scripted", broken=2)
    splits: tuple[Split, ...] = ("train", "eval")
    for split in splits:
        found = [task.problem(split, seed) for seed in range(40)]
        assert found == [make("scripted", broken=2).problem(split, seed) for seed in range(40)]
        wanted = [sound.problem(split, seed) for seed in range(40)]
        kept = [one == other for one, other in zip(found, wanted, strict=True)]
        assert kept == [int(problem.messages[0]["content"].split("?")[0]) % 4 >= 2 for problem in wanted]
        assert 5 < sum(kept) < 35


@pytest.mark.usefixtures("scripted")
def test_a_generator_that_always_raises_is_one_line() -> None:
    with pytest.raises(
        ConfigError, match=r"scripted refuses: 20 items in a row cannot be made: no cell found; allowed"
    ):
        make("scripted", broken=4)


def test_the_same_question_counts_once() -> None:
    """Of 60 seeds of tower_of_hanoi, many ask the same."""
    config = resolve("tiny", ["eval.num_ids=60", "eval.id_seed_start=5000"]).config
    task = make("tower_of_hanoi")
    asked = {task.problem("eval", seed).messages[0]["content"] for seed in range(5000, 5060)}
    found, line = contents.evaluation_problems(task, config)
    assert len(found) == len(asked) < 50
    assert line == f"eval.num_ids = 60: {len(asked)} different problems; each counts once"


@pytest.mark.parametrize("name", ["sokoban", "rubiks_cube"])
def test_a_signal_is_not_caught_by_a_judge(name: str) -> None:
    """Both have an `except` for whatever is raised in them."""
    task = make(name)
    problem = task.problem("eval", 0)
    prompt = Prompt(problem.id, problem.messages, (1,))
    answer = Completion((1,), task.reference_answer(problem), (0.0,), "stop", 0)
    moments = count_lines(lambda: judge(task, [problem], [prompt], [[answer]]))
    for number in range(1, 21):
        with pytest.raises(Interrupted), handled(), send_at(number * moments // 22):
            judge(task, [problem], [prompt], [[answer]])


def test_the_docs_list_what_is_not_strict() -> None:
    page = (ROOT / "docs" / "tasks.md").read_text()
    for names in (PASSES_WORDS, PASSES_A_DIGIT, SEVERAL_ANSWERS, UNANSWERED, HASHED):
        assert ", ".join(f"`{name}`" for name in sorted(names)) in page.replace("\n", " ")
    assert [name for name in GENERATORS if f"`{name}`" not in page] == []


@pytest.mark.parametrize("name", ["gcd", "leg_counting", "chain_sum"])
def test_neighbouring_seeds_and_splits_share_nothing(name: str) -> None:
    task = make(name)
    splits: tuple[Split, ...] = ("train", "eval")
    train, held_out = ([task.problem(split, seed).messages[0]["content"] for seed in range(150)] for split in splits)
    assert len(set(train)) == len(train)
    assert not set(train) & set(held_out)


def test_problems_are_the_same_in_every_process() -> None:
    program = (
        "from grpo_mlflow.tasks import create\nfor n in ('list_functions', 'gcd', 'pool_matrix', 'zebra_puzzles'):\n"
    )
    program += " print(create(f'reasoning_gym/{n}', {}).problem('train', 7))"
    done = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT).stdout
        for _ in range(2)
    ]
    assert done[0] == done[1] != ""


@pytest.mark.parametrize(
    ("name", "item", "right", "wrong"),
    [
        (
            "countdown",
            {"answer": "8*(5 - 2)", "metadata": {"numbers": [8, 5, 2], "target": 24}},
            ["(5-2)*8", "8 * (5 - 2)"],
            ["8*3", "24", "8*(5-2)+0", "8*(5-2", "8**5-2", "8*(5-2) or 3", "8/(5-5)"],
        ),
        (
            "puzzle24",
            {"answer": "", "metadata": {"numbers": [5, 1, 2, 8]}},
            ["8*(5*1-2)", "(5-2)*8*1"],
            ["6*4*1*1", "24"],
        ),
        (
            "simple_integration",
            {"answer": "", "metadata": {"integrand": "6*x**2 + x/2", "variable": "x"}},
            ["2*x**3 + x**2/4 + C", "2*x^3+0.25*x^2", "x**2*(2*x + 1/4) - 7"],
            [
                "2*x**3 + C",
                "Integral(6*x**2 + x/2, x)",
                "2*x**3 + x**2/4 + y",
                "6*x**2 + x/2",
                "1/0",
                "().__class__",
                "x.real",
            ],
        ),
        (
            "intermediate_integration",
            {"answer": "", "metadata": {"integrand": "sin(x)*cos(x)", "variable": "x"}},
            ["sin(x)**2/2 + C", "-cos(x)**2/2", "-cos(2*x)/4 + C"],
            ["sin(x)**2 + C", "Integral(sin(x)*cos(x), x) + C", "sin(sin(x))", "print(1)", "exec('1')"],
        ),
        (
            "polynomial_multiplication",
            {"answer": "2*x**2 + 3*x + 1", "metadata": {"variables": ["x"]}},
            ["1 + 3*x + 2*x**2", "2*x^2+3*x+1"],
            ["(2*x + 1)*(x + 1)", "2*x**2 + 3*x", "2*y**2 + 3*y + 1", "__import__('os')"],
        ),
        ("gsm_symbolic", {"answer": "12"}, ["12", "$12", "12.0"], ["12 or 13", "12 13", "1", "x12"]),
        (
            "propositional_logic",
            {"score": lambda *_: 1.0},  # contradictory premises, from which every formula follows
            ["\xacP", "(P \u2227 \xacQ)", "P \u2192 (Q \u2228 \xac\xacR)"],
            ["\xacP or 12345, or banana", "\xacP\nbanana", "\xacP \xacP", "banana", "P Q", "P \u2227", "\u2227 P", ""],
        ),
        ("game_of_life_halting", {"answer": "False"}, ["False", "false"], ["True", "no", "False or True"]),
        ("coin_flip", {"answer": "0.890625"}, ["0.890625", "57/64", "0.8906"], ["0", "0.9", "0.89", "8"]),
        ("n_queens", {"metadata": {"valid_answers": ["_ Q", "Q _"]}}, ["_ Q", "Q _"], ["Q Q", "[['_', 'Q']]"]),
        ("spiral_matrix", {"answer": "1 2 3 "}, ["1 2 3"], ["1 2", "[1, 2, 3]"]),
    ],
)
def test_our_own_judges(name: str, item: dict[str, object], right: list[str], wrong: list[str]) -> None:
    assert [text for text in right if not JUDGES[name](text, item)] == []
    accepted = []
    for text in wrong:
        try:
            accepted += [text] if JUDGES[name](text, item) else []
        except TypeError:  # 1/0 has no value to compare; the task counts what raises as wrong
            continue
    assert accepted == []


def test_no_judge_runs_a_text_as_code(tmp_path: Path) -> None:
    for name in sorted(JUDGES):
        task = make(name)
        problem, mark = task.problem("train", 0), tmp_path / "mark"
        for text in (f"open({str(mark)!r}, 'w')", f"__import__('pathlib').Path({str(mark)!r}).touch()"):
            assert not task.verify(problem, f"<SOLUTION>{text}</SOLUTION>").success
            assert not mark.exists()


def test_settings_reach_the_generator() -> None:
    task = make("gcd", min_numbers=4, max_numbers=4)
    assert task.problem("train", 3).messages[0]["content"].count(",") == 3


@pytest.mark.parametrize(
    ("name", "settings", "fragments"),
    [
        ("gcdd", {}, ["data.task = 'reasoning_gym/gcdd'", "no such generator", "allowed: gcd"]),
        ("composite", {}, ["no such generator"]),
        ("gcd", {"lowest": 1}, ["data.reasoning_gym = {'lowest': 1}", "unknown: lowest", "allowed: max_numbers"]),
        ("gcd", {"seed": 1}, ["unknown: seed"]),
        ("gcd", {"min_numbers": 0}, ["data.reasoning_gym = {'min_numbers': 0}", "gcd refuses"]),
        ("gcd", {"min_numbers": "two"}, ["data.reasoning_gym = {'min_numbers': 'two'}", "gcd refuses"]),
    ],
)
def test_what_a_generator_refuses_is_one_line(name: str, settings: dict[str, object], fragments: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        create(f"reasoning_gym/{name}", settings)
    assert "\n" not in str(caught.value)
    assert [fragment for fragment in fragments if fragment not in str(caught.value)] == []


def test_problems_that_depend_on_the_hash_seed_need_it_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED")
    with pytest.raises(ConfigError, match="PYTHONHASHSEED=0"):
        make("word_ladder")
