"""One conformance suite over every task and several difficulties, then exact tables for each task's answers."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from typing import Any

import numpy as np
import pytest

from grpo_mlflow import tasks
from grpo_mlflow.config import Config, resolve
from grpo_mlflow.model import tiny
from grpo_mlflow.tasks import TASKS, Task, create
from grpo_mlflow.tasks.settings import task_settings
from grpo_mlflow.types import Problem, Split
from tests.support.timing import quick

SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("arithmetic", {}),
    ("arithmetic", {"digits": 1}),
    ("arithmetic", {"operations": ("*",), "digits": 1}),
    ("arithmetic", {"operations": ("-",), "digits": 2}),
    ("arithmetic", {"operations": ("+", "-", "*"), "digits": 1, "terms": 3}),
    ("arithmetic", {"operations": ("*", "+"), "digits": 9, "terms": 6}),
    ("sat", {}),
    ("sat", {"difficulty": (0.0, 0.0)}),
    ("sat", {"difficulty": (0.5, 0.5)}),
    ("sat", {"difficulty": (1.0, 1.0)}),
]
SPLITS: tuple[Split, ...] = ("train", "eval")
EVERY = pytest.mark.parametrize("task", [create(n, s) for n, s in SETTINGS], ids=[f"{n}-{s}" for n, s in SETTINGS])
GARBAGE = [
    *("", " \n\t ", "\x00", "<SOLUTION>", "</SOLUTION>", "<SOLUTION></SOLUTION>", "</SOLUTION>0 1<SOLUTION>"),
    *("<SOLUTION>\x00</SOLUTION>", "<SOLUTION><SOLUTION>0 1 0 1</SOLUTION></SOLUTION>", "the answer is unknown"),
    *("-", "--1", "1e3", "0x10", "nan", "inf", "٤٦", "४२", "²", "\ud800", "1" * 5000, "9" * 100_000),
    " " * 100_000 + "x",
    "<SOLUTION>" + "0 " * 50_000 + "</SOLUTION>",
    "<SOLUTION>" + " " * 99_000 + "x</SOLUTION>",
    *("<SOLUTION>" * 10_000, "</SOLUTION>" * 9_000, "<SOLUTION>0</SOLUTION>" * 4_500, "(" * 100_000),
]


@pytest.mark.parametrize(
    ("name", "problems", "recipe"),
    [("arithmetic", "0bcefeedb8eee5ee", "8322c347de597a00"), ("sat", "f368d9d2f1be1ebb", "a4cecc6ccf931e29")],
)
def test_default_problems_and_the_embedded_model_stay_what_they_are(name: str, problems: str, recipe: str) -> None:
    config = resolve("tiny", [f"data.task={name}"]).config
    task, first = tasks.of(config), config.data.train_seed_start
    made = [task.problem(split, first + i) for split in SPLITS for i in range(300)]
    text = repr([(p.id, p.seed, p.messages, p.payload) for p in made])
    key = [tiny._RECIPE, config.model.tiny.model_dump(), task.name, task_settings(config), tiny._corpus()]
    digests = [hashlib.blake2b(t.encode(), digest_size=8).hexdigest() for t in (text, json.dumps(key, sort_keys=True))]
    assert digests == [problems, recipe]


def _content(problem: Problem) -> str:
    return "\n".join(message["content"] for message in problem.messages)


def _expression(problem: Problem) -> str:
    found = re.search(r"\d+(?:[-+*]\d+)+", _content(problem))
    return found.group() if found else ""


def _canonical(problem: Problem) -> str:
    """Return the message, or for a pure sum or product its sorted operands."""
    expression = _expression(problem)
    operations: set[str] = set(re.findall(r"[-+*]", expression))
    if operations in ({"+"}, {"*"}):
        operation = operations.pop()
        return operation.join(sorted(expression.split(operation)))
    return _content(problem)


def test_every_task_is_in_this_suite() -> None:
    assert {name for name, _ in SETTINGS} == set(TASKS)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_the_config_section_makes_the_task(name: str) -> None:
    task = create(name, getattr(Config().data, name).model_dump())
    assert task.name == name
    assert task.problem("train", 3) == create(name, {}).problem("train", 3)


@EVERY
@pytest.mark.parametrize("split", SPLITS)
def test_own_answer_succeeds(task: Task, split: Split) -> None:
    for seed in range(40):
        problem = task.problem(split, seed)
        verdict = task.verify(problem, task.reference_answer(problem))
        assert verdict.success
        assert verdict.parsed is not None
        assert verdict.reward <= task.reward_range[1]


@EVERY
@pytest.mark.parametrize("text", GARBAGE, ids=[repr(text[:20]) + f"x{len(text)}" for text in GARBAGE])
def test_garbage_never_raises_and_never_succeeds(task: Task, text: str) -> None:
    problem = task.problem("train", 0)
    verdict = quick(lambda: task.verify(problem, text))
    assert not verdict.success
    assert task.reward_range[0] <= verdict.reward <= task.reward_range[1]


@EVERY
def test_damaged_answers_never_raise(task: Task) -> None:
    rng = np.random.default_rng(0)
    problem = task.problem("eval", 0)
    answer = task.reference_answer(problem)
    for _ in range(200):
        letters = list(answer)
        for _ in range(int(rng.integers(1, 6))):
            letters.insert(int(rng.integers(len(letters) + 1)), chr(int(rng.integers(0, 0xD800))))
        verdict = task.verify(problem, "".join(letters))
        assert verdict.reward == pytest.approx(sum(verdict.parts.values()), abs=1e-12)


@EVERY
def test_two_answers_are_no_answer(task: Task) -> None:
    problem = task.problem("train", 5)
    answer = task.reference_answer(problem)
    for text in (f"{answer} {answer}", f"{answer}\n{answer}", f"{answer}, {answer}"):
        verdict = task.verify(problem, text)
        assert not verdict.success
        assert verdict.parsed is None


@EVERY
@pytest.mark.parametrize("split", SPLITS)
def test_a_seed_always_makes_the_same_problem(task: Task, split: Split) -> None:
    first = [task.problem(split, seed) for seed in range(20)]
    assert [task.problem(split, seed) for seed in reversed(range(20))][::-1] == first
    assert len({problem.id for problem in first}) == 20
    assert [problem.seed for problem in first] == list(range(20))


@EVERY
def test_splits_share_no_content(task: Task) -> None:
    count = 2000 if task.name == "arithmetic" else 600
    train, evaluation = ({_canonical(task.problem(split, seed)) for seed in range(count)} for split in SPLITS)
    assert min(len(train), len(evaluation)) > 1
    assert not train & evaluation


def test_commuted_sums_count_as_the_same_content() -> None:
    problems = [Problem("p", 0, ({"role": "user", "content": f"{text} ="},)) for text in ("34+12+5", "12-5+34")]
    assert [_canonical(problem) for problem in problems] == ["12+34+5", "12-5+34 ="]


@EVERY
@pytest.mark.parametrize("split", SPLITS)
def test_neighbouring_seeds_differ(task: Task, split: Split) -> None:
    contents = [_content(task.problem(split, seed)) for seed in range(200)]
    same = sum(a == b for a, b in itertools.pairwise(contents))
    assert same <= 30  # a space of eleven sums repeats by chance
    if task.name == "sat" or len(set(contents)) > 190:
        assert same == 0


@EVERY
def test_demonstrations_are_well_formed_and_wrong_as_often_as_asked(task: Task) -> None:
    rng = np.random.default_rng(1)
    problems = [task.problem("train", seed) for seed in range(20)]
    for error_rate, low, high in ((0.0, 1.0, 1.0), (1.0, 0.0, 0.0), (0.3, 0.62, 0.78)):
        verdicts = [
            task.verify(problem, task.demonstration(problem, rng, error_rate))
            for problem in problems
            for _ in range(25)
        ]
        assert all(verdict.parsed is not None for verdict in verdicts)
        assert low <= sum(verdict.success for verdict in verdicts) / len(verdicts) <= high


@EVERY
def test_right_pays_more_than_wrong_and_wrong_more_than_malformed(task: Task) -> None:
    rng = np.random.default_rng(2)
    for seed in range(30):
        problem = task.problem("train", seed)
        answer = task.reference_answer(problem)
        right, wrong = (task.verify(problem, text) for text in (answer, task.demonstration(problem, rng, 1.0)))
        malformed = [task.verify(problem, text) for text in ("", "?", answer + answer, f"={answer}<", *GARBAGE[:10])]
        malformed = [verdict for verdict in malformed if verdict.parsed is None]
        assert len(malformed) > 10
        assert right.reward > wrong.reward > max(verdict.reward for verdict in malformed)
        for verdict in (right, wrong, *malformed):
            assert verdict.reward == pytest.approx(sum(verdict.parts.values()), abs=1e-12)


ARITHMETIC = create("arithmetic", {})
NOT_AN_INTEGER = [
    *("", "46.", "46.0", "+46", "4 6", "46 46", "46\n46", "46\x00", "- 46", "=46", "46, 47", "forty-six", "4" * 5000),
    *("\u0664\u0666", "\uff14\uff16", "4_6", "0x2e", "46e0"),
]


@pytest.mark.parametrize(
    ("text", "parsed", "success"),
    [
        ("46", "46", True),
        (" 46\n", "46", True),
        ("046", "046", True),
        ("-46", "-46", False),
        ("47", "47", False),
        ("4" * 40, "4" * 40, False),
        *((text, None, False) for text in NOT_AN_INTEGER),
    ],
)
def test_arithmetic_answers(text: str, parsed: str | None, success: bool) -> None:
    verdict = ARITHMETIC.verify(Problem("p", 0, (), {"answer": 46}), text)
    assert (verdict.parsed, verdict.success) == (parsed, success)
    assert verdict.reward == pytest.approx(1.0 if success else 0.1 if parsed else 0.0)


def test_arithmetic_products_bind_first() -> None:
    task = create("arithmetic", {"operations": ("+", "-", "*"), "digits": 2, "terms": 5})
    seen = ""
    for seed in range(200):
        problem = task.problem("train", seed)
        expression = _expression(problem)
        terms = [(sign, term.split("*")) for sign, term in re.findall(r"([+-]?)([\d*]+)", expression)]
        value = sum((-1 if sign == "-" else 1) * math.prod(map(int, factors)) for sign, factors in terms)
        assert task.reference_answer(problem) == str(value), expression
        seen += expression
    assert set(seen) == set("0123456789+-*")


def test_arithmetic_demonstrations_are_wrong_in_one_digit() -> None:
    problem, rng = Problem("p", 0, (), {"answer": -46}), np.random.default_rng(0)
    wrong = {ARITHMETIC.demonstration(problem, rng, 1.0) for _ in range(500)}
    assert wrong == {f"-{n}" for n in (16, 26, 36, 56, 66, 76, 86, 96, 40, 41, 42, 43, 44, 45, 47, 48, 49)}


def test_arithmetic_chance_is_one_in_all_numbers_of_that_length() -> None:
    assert [ARITHMETIC.chance(Problem("p", 0, (), {"answer": n})) for n in (7, -7, 46, 150)] == [0.1, 0.1, 0.01, 0.001]


SAT = create("sat", {})
WRONG_TAGS = [
    *("<SOLUTION><SOLUTION>0 1 0 0</SOLUTION>", "<SOLUTION>0 1 0 0</SOLUTION></SOLUTION>", "<SOLUTION>0 1 0 0"),
    *("0 1 0 0</SOLUTION>", "</SOLUTION>0 1 0 0<SOLUTION>", "<solution>0 1 0 0</solution>", "0 1 0 0", ""),
]
# x2 = 1 satisfies (x1 OR x2 OR x3) AND (NOT x1 OR x2 OR x4)
FORMULA = Problem("p", 0, (), {"variables": 4, "clauses": ((1, 2, 3), (-1, 2, 4))})


@pytest.mark.parametrize(
    ("text", "parsed", "success", "reward"),
    [
        # strict form 0.045, tags 0.02, count 0.045, nothing after 0.02, only bits 0.005; correct 1 or 0, malformed -0.2
        ("<SOLUTION>0 1 0 0</SOLUTION>", "0 1 0 0", True, 1.135),
        ("<SOLUTION>0 1 0 0</SOLUTION>\n", "0 1 0 0", True, 1.135),
        ("First x2. <SOLUTION>0 1 0 0</SOLUTION>", "0 1 0 0", True, 1.135),
        ("<SOLUTION> 0\n1  0 0 </SOLUTION>", "0 1 0 0", True, 1.09),
        ("<SOLUTION>0 1 0 0</SOLUTION> done", "0 1 0 0", True, 1.115),
        ("<SOLUTION>1 0 0 0</SOLUTION>", "1 0 0 0", False, 0.135),
        ("<SOLUTION>1 0 0 0</SOLUTION> done", "1 0 0 0", False, 0.115),
        ("<SOLUTION>0 1 0</SOLUTION>", None, False, -0.11),
        ("<SOLUTION>0 1 0 0 0</SOLUTION>", None, False, -0.11),
        ("<SOLUTION>0,1,0,0</SOLUTION>", None, False, -0.16),
        ("<SOLUTION>0, 1, 0, 0</SOLUTION>", None, False, -0.16),
        ("<SOLUTION>0100</SOLUTION>", None, False, -0.16),
        ("<SOLUTION>0 1 0 2</SOLUTION>", None, False, -0.16),
        ("<SOLUTION>0 1 0 0\x00</SOLUTION>", None, False, -0.16),
        ("<SOLUTION>\u0660 \u0661 \u0660 \u0660</SOLUTION>", None, False, -0.16),
        ("<SOLUTION></SOLUTION>", None, False, -0.16),
        ("<SOLUTION>0 1 0 0</SOLUTION><SOLUTION>0 1 0 0</SOLUTION>", None, False, -0.2),
        ("<SOLUTION>0 1 0 0</SOLUTION> or <SOLUTION>1 1 1 1</SOLUTION>", None, False, -0.2),
        *((text, None, False, -0.2) for text in WRONG_TAGS),
    ],
)
def test_sat_answers(text: str, parsed: str | None, success: bool, reward: float) -> None:
    verdict = SAT.verify(FORMULA, text)
    assert (verdict.parsed, verdict.success) == (parsed, success)
    assert verdict.reward == pytest.approx(reward)


@pytest.mark.parametrize(
    ("difficulty", "variables", "clauses"),
    # 4 + floor(5.5 d) to 4 + floor(11 d) and 5 + floor(7.5 d) to 5 + floor(15 d)
    [((0.0, 0.0), (4, 4), (5, 5)), ((0.5, 0.5), (6, 9), (8, 12)), ((1.0, 1.0), (9, 15), (12, 20))],
)
def test_sat_sizes(difficulty: tuple[float, float], variables: tuple[int, int], clauses: tuple[int, int]) -> None:
    task = create("sat", {"difficulty": difficulty})
    payloads = [task.problem("train", seed).payload for seed in range(150)]
    sizes, counts = ([f(p) for p in payloads] for f in (lambda p: p["variables"], lambda p: len(p["clauses"])))
    assert (min(sizes), max(sizes)) == variables
    assert (min(counts), max(counts)) == clauses
    every = [clause for p in payloads for clause in p["clauses"]]
    assert all(len({abs(v) for v in clause}) == len(clause) == 3 for clause in every)
    assert all(1 <= abs(v) <= p["variables"] for p in payloads for clause in p["clauses"] for v in clause)
    assert np.mean([v < 0 for clause in every for v in clause]) == pytest.approx(0.5, abs=0.06)


def test_sat_prompt_states_the_payload() -> None:
    problem = SAT.problem("train", 4)
    clauses = [clause.split(" OR ") for clause in re.findall(r"\(([^()]*)\)", _content(problem))]
    read = [[int(literal.replace("NOT x", "-").removeprefix("x")) for literal in clause] for clause in clauses]
    assert read == [list(clause) for clause in problem.payload["clauses"]]


@pytest.mark.parametrize("seed", range(6))
def test_sat_chance_is_the_share_of_satisfying_assignments(seed: int) -> None:
    problem = create("sat", {"difficulty": (0.0, 0.6)}).problem("eval", seed)
    assignments = itertools.product("01", repeat=problem.payload["variables"])
    solved = [SAT.verify(problem, f"<SOLUTION>{' '.join(bits)}</SOLUTION>").success for bits in assignments]
    assert SAT.chance(problem) == pytest.approx(np.mean(solved))


def test_random_bits_solve_about_a_quarter_of_the_default_sat() -> None:
    assert np.mean([SAT.chance(SAT.problem("eval", seed)) for seed in range(300)]) == pytest.approx(0.27, abs=0.03)
