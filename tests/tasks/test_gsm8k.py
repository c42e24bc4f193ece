"""GSM8K: the final number of a text, rows from files, and what counts as right."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from grpo_mlflow import tasks
from grpo_mlflow.config import resolve
from grpo_mlflow.errors import ConfigError, UserError
from grpo_mlflow.tasks import Gsm8k, contents
from grpo_mlflow.tasks.numbers import final_number, is_number
from grpo_mlflow.types import Problem
from tests.support.timing import quick

FORMS: list[tuple[str, str]] = [
    ("1,450", "1450"),
    ("-3", "-3"),
    ("0.5", "1/2"),
    ("$12", "12"),
    ("1/2", "1/2"),
    ("12.", "12"),
    ("12", "12"),
    (" 12 \n", "12"),
    ("12.0", "12"),
    ("12.50", "25/2"),
    ("+7", "7"),
    (".5", "1/2"),
    ("0012", "12"),
    ("$1,450.75", "5803/4"),
    ("-$5", "-5"),
    ("$-5", "-5"),
    ("$ 12", "12"),
    ("\u20ac30", "30"),
    ("12 dollars", "12"),
    ("12USD", "12"),
    ("USD 12", "12"),
    ("Rs. 250", "250"),
    ("50%", "50"),
    ("12.5 %", "25/2"),
    ("18kg", "18"),
    ("18 km/h", "18"),
    ("\u22123", "-3"),
    ("1 1/2", "3/2"),
    ("2\xbd hours", "5/2"),
    ("3 / 4", "3/4"),
    ("-1/2", "-1/2"),
    ("1,234,567", "1234567"),
    ("1\u202f450", "1450"),
    ("1e3", "1000"),
    ("2 million", "2000000"),
    ("**42**", "42"),
    ("Answer: 42", "42"),
    ("The answer is 42.", "42"),
    ("The answer is: $1,450.", "1450"),
    ("The answer is 12, since 3 * 4 is that.", "12"),
    ("The final answer is 3 * 4 = 12 apples on 2 tables.", "12"),
    ("#### 1,450", "1450"),
    ("He has 5.\n#### 7", "7"),
    ("#### -3 degrees", "-3"),
    ("<SOLUTION>12</SOLUTION>", "12"),
    ("First 5, then 7. <SOLUTION> $12.00 </SOLUTION> Bye 99", "12"),
    ("<solution>\n3 + 4 = 7\n</solution>", "7"),
    ("<answer>1/2</answer>", "1/2"),
    ("<SOLUTION>- 3</SOLUTION>", "-3"),
    ("<SOLUTION>minus 3</SOLUTION>", "-3"),
    ("#### 5\nNo, wait. <SOLUTION>6</SOLUTION>", "6"),
    ("so \\boxed{42}", "42"),
    ("\\boxed{\\frac{1}{2}}", "1/2"),
    ("$\\boxed{-\\dfrac{3}{4}}$", "-3/4"),
    ("\\boxed{1{,}450}", "1450"),
    ("\\boxed{\\$12.50}", "25/2"),
    ("\\boxed{50\\%}", "50"),
    ("\\boxed{12 \\text{ apples}}", "12"),
    ("\\boxed{3}, no: \\boxed{4}", "4"),
    ("5 apples and 7 pears make 12", "12"),
    ("5 + 7 = 12", "12"),
    ("Tom had 10-3 = 7 left.", "7"),
    ("\uff11", "1"),
    ("\u0664", "4"),
    ("She pays $3 x 4 = $12 on the 5th day.", "12"),
    ("Is it 3? No, it is -3!", "-3"),
    ("Step 1: 48/2 = 24.\nStep 2: 48+24 = 72.", "72"),
    ("x2 = 9", "9"),
    ("The total is 1,450, not 1,540? It is 1,450.", "1450"),
    ("The answer is below.\n\n18", "18"),
    ("... 12...", "12"),
    ("(12)", "12"),
    ("12!", "12"),
    ("=12", "12"),
    ("**Answer:** $18", "18"),
    ("The answer is **18**.", "18"),
    ("The answer is $\\frac{1}{2}$", "1/2"),
    ("The answer is x = 5.", "5"),
    ("12/4 = 3", "3"),
    ("3:1 ratio gives 15 boys, 5 girls; total 20 children.", "20"),
]
NO_NUMBER = [
    *("", "twelve", "<SOLUTION></SOLUTION> 12", "<SOLUTION>12 or 13</SOLUTION>", "<SOLUTION>12", "12</SOLUTION>"),
    *(
        "<SOLUTION>12</SOLUTION> <SOLUTION>13</SOLUTION>",
        "</SOLUTION>12<SOLUTION>",
        "#### 12 or 13",
        "#### none",
        "1/0",
    ),
    *("x2", "5th", "It takes 10-12"),
]


@pytest.mark.parametrize(("text", "number"), FORMS, ids=[repr(text) for text, _ in FORMS])
def test_the_number_of_a_text(text: str, number: str) -> None:
    assert final_number(text) == Fraction(number)


@pytest.mark.parametrize("text", NO_NUMBER, ids=repr)
def test_a_text_without_one_answer(text: str) -> None:
    assert final_number(text) is None


@pytest.mark.parametrize(
    "text",
    [
        *(
            "9" * 100_000,
            "1," * 50_000,
            "-" * 100_000,
            " " * 100_000 + "x",
            "1/" * 50_000,
            "\\boxed{" * 10_000,
            "1 " * 50_000,
        ),
        *("answer is " * 10_000, "=1" * 50_000, "<SOLUTION>" * 10_000, "$" * 100_000, "answer is " + " " * 100_000),
        *("\\frac{1" * 20_000, "1.1" * 40_000, "answer" + " " * 100_000, "answer is" + "1+" * 50_000, "\x00", "\ud800"),
        *("1" + ",000" * 30_000, "1 000" * 20_000, "1 " + "000 " * 20_000, "1e" * 50_000, "1e" + "9" * 50_000),
        *("10^" * 30_000, "10^" + "9" * 50_000, "\\text{" * 15_000, "\\frac{1}{2}" * 10_000, "~~1" * 30_000),
        *("1 or " * 20_000, "between 1 and " * 7_000, "1 hour " * 15_000, "\u20141" * 50_000, "\xbd" * 50_000),
        *("minus " * 20_000, "5 million " * 10_000, "\\boxed{1} or " * 8_000, "** " * 30_000, "_1" * 50_000),
    ],
    ids=lambda text: repr(text[:12]),
)
def test_no_text_takes_long(text: str) -> None:
    quick(lambda: final_number(text))


def test_what_is_only_a_number() -> None:
    assert [text for text in ("12", "$1,450.50", "-3", "1/2", "50%", " 7 ") if not is_number(text)] == []
    assert [text for text in ("", "12 apples", "1 2", "x", "3 + 4", "1/0") if is_number(text)] == []


def row(question: str, answer: str) -> dict[str, str]:
    return {"question": question, "answer": f"Some steps with 99.\n#### {answer}"}


def jsonl(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


TRAIN = [row(f"train {i}?", f"{i},000") for i in range(20)]
TEST = [row(f"test {i}?", str(-i)) for i in range(5)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    jsonl(tmp_path / "train.jsonl", [*TRAIN, TEST[0], TRAIN[3]])
    jsonl(tmp_path / "test.jsonl", TEST)
    return tmp_path


def question(problem: Problem) -> str:
    return problem.messages[0]["content"].partition("\n")[0]


def test_seeds_name_rows_of_their_split(folder: Path) -> None:
    task = Gsm8k(str(folder))
    assert [question(task.problem("train", 20 + i)) for i in range(20)] == [f"train {i}?" for i in range(20)]
    assert [question(task.problem("eval", i)) for i in range(10)] == [f"test {i % 5}?" for i in range(10)]
    assert [task.problem("train", i).payload["answer"] for i in (0, 7)] == ["0", "7000"]
    assert task.problem("eval", 3).payload["answer"] == "-3"
    assert "<SOLUTION></SOLUTION>" in task.problem("train", 0).messages[0]["content"]


def test_parquet_as_the_hub_has_it(tmp_path: Path) -> None:
    (tmp_path / "main").mkdir()
    for split, rows in (("train", TRAIN), ("test", TEST)):
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows), tmp_path / "main" / f"{split}-00000-of-00001.parquet"
        )
    jsonl(tmp_path / "one.jsonl", TRAIN).rename(tmp_path / "README.md")
    task = Gsm8k(str(tmp_path))
    assert {split: len(rows) for split, rows in task.splits.items()} == {"train": 20, "eval": 5}


def test_a_single_file_is_split_by_content(tmp_path: Path) -> None:
    rows = [row(f"question {i}?", str(i)) for i in range(300)]
    one, other = (
        Gsm8k(str(jsonl(tmp_path / name, part))) for name, part in (("a.jsonl", rows), ("b.jsonl", rows[::-1]))
    )
    splits = {split: {each.question for each in found} for split, found in one.splits.items()}
    assert splits == {split: {each.question for each in found} for split, found in other.splits.items()}
    assert not splits["train"] & splits["eval"]
    assert sum(map(len, splits.values())) == 300
    assert 30 < len(splits["eval"]) < 90


def questions(path: Path) -> dict[str, set[str]]:
    return {split: {row.question for row in rows} for split, rows in Gsm8k(str(path)).splits.items()}


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train.jsonl", "test.jsonl"),
        ("Train.JSONL", "Test.JSONL"),
        ("gsm8k_train.jsonl", "GSM8K-TEST-v2.jsonl"),
        ("gsm8kTrain.jsonl", "gsm8kTest.jsonl"),
        ("training-00000-of-00001.jsonl", "test1.jsonl"),
        ("train.jsonl", "validation.jsonl"),
        ("train.jsonl", "val-00000.jsonl"),
        ("train.jsonl", "dev.jsonl"),
        ("train.jsonl", "pretrain-eval.jsonl"),
    ],
)
def test_names_of_files_tell_their_split(tmp_path: Path, train: str, test: str) -> None:
    jsonl(tmp_path / train, TRAIN)
    jsonl(tmp_path / test, TEST)
    jsonl(tmp_path / "latest-contest.jsonl", [row("other?", "1")])  # neither word is `test`
    found = questions(tmp_path)
    assert found == {"train": {each["question"] for each in TRAIN}, "eval": {each["question"] for each in TEST}}


@pytest.mark.parametrize("name", ["latest.jsonl", "contest.jsonl", "devices.jsonl", "more.jsonl", "train-test.jsonl"])
def test_a_name_that_only_contains_a_split_tells_none(tmp_path: Path, name: str) -> None:
    """Both files are then split by content, as one would be."""
    rows = [row(f"question {i}?", str(i)) for i in range(60)]
    jsonl(tmp_path / "train.jsonl", rows[:30])
    jsonl(tmp_path / name, rows[30:])
    found = questions(tmp_path)
    one = tmp_path / "one"
    one.mkdir()
    assert found == questions(jsonl(one / "all.jsonl", rows))
    assert 30 < len(found["train"]) < 60


def test_with_a_test_file_the_validation_file_is_left_out(folder: Path) -> None:
    before = questions(folder)
    jsonl(folder / "validation.jsonl", [row("validation?", "1")])
    assert questions(folder) == before


def test_questions_that_differ_in_case_and_white_space_are_one(tmp_path: Path) -> None:
    jsonl(
        tmp_path / "train.jsonl",
        [row("How MANY\n apples? ", "1"), row("how many pears?", "2"), row("How many pears?", "2")],
    )
    jsonl(tmp_path / "test.jsonl", [row("how many apples?", "1"), row("How many  apples?", "1")])
    assert questions(tmp_path) == {"train": {"how many pears?"}, "eval": {"how many apples?"}}
    rows = [row(f"Question  {i}?" if i % 2 else f"question {i // 2 * 2 + 1}? ", "1") for i in range(300)]
    found = questions(jsonl(tmp_path / "one.jsonl", rows))
    assert len(found["train"]) + len(found["eval"]) == 150


def test_a_byte_order_mark_is_no_part_of_a_row(tmp_path: Path) -> None:
    for name, rows in (("train.jsonl", TRAIN), ("test.jsonl", TEST)):
        jsonl(tmp_path / name, rows)
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
    assert {split: len(rows) for split, rows in Gsm8k(str(tmp_path)).splits.items()} == {"train": 20, "eval": 5}


@pytest.mark.parametrize(
    ("gold", "number"),
    [
        ("\u22123", "-3"),
        ("$1,450", "1450"),
        ("1 450", "1450"),
        ("\xbd", "1/2"),
        ("3,5", "7/2"),
        ("12.", "12"),
        ("50%", "50"),
    ],
)
def test_gold_numbers_are_read_as_answers_are(tmp_path: Path, gold: str, number: str) -> None:
    jsonl(tmp_path / "train.jsonl", TRAIN)
    jsonl(tmp_path / "test.jsonl", [row("q?", gold)])
    assert Gsm8k(str(tmp_path)).splits["eval"][0].number == number


@pytest.mark.parametrize(
    ("text", "success", "reward"),
    [
        ("<SOLUTION>1450</SOLUTION>", True, 1.0),
        ("So 3 and 1,450: <SOLUTION>$1,450.00</SOLUTION>", True, 1.0),
        ("<SOLUTION>1450 apples</SOLUTION>", True, 0.95),
        ("It is 1,450.", True, 0.9),
        ("#### 1450", True, 0.9),
        ("<SOLUTION>1451</SOLUTION>", False, 0.1),
        ("<SOLUTION>1450.0000001</SOLUTION>", False, 0.1),
        ("1 450", False, 0.0),
        ("<SOLUTION>1450 or 1451</SOLUTION>", False, 0.0),
        ("<SOLUTION>1450</SOLUTION><SOLUTION>1450</SOLUTION>", False, 0.0),
        ("", False, 0.0),
    ],
)
def test_rewards(folder: Path, text: str, success: bool, reward: float) -> None:
    verdict = Gsm8k(str(folder)).verify(Problem("p", 0, (), {"answer": "1450"}), text)
    assert verdict.success == success
    assert verdict.reward == pytest.approx(reward)
    assert verdict.reward == pytest.approx(sum(verdict.parts.values()))
    assert set(verdict.parts) == {"correct", "tags", "only_number"}


def test_own_answers_succeed(folder: Path) -> None:
    task = Gsm8k(str(folder))
    for seed in range(20):
        problem = task.problem("train", seed)
        assert task.verify(problem, task.reference_answer(problem)).reward == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "content", "fragments"),
    [
        ("a.jsonl", '{"question": "q"}\n', ["a.jsonl: row 1 is not of GSM8K", "`question` and `answer`"]),
        ("a.jsonl", '{"question": "q", "answer": "#### many"}\n', ["a.jsonl: row 1", "#### and a number"]),
        ("a.jsonl", '{"question": "q", "answer": "#### 1e400000000"}\n', ["a.jsonl: row 1", "#### and a number"]),
        ("a.jsonl", '{"question": "q", "answer": "#### 3 or 4"}\n', ["a.jsonl: row 1", "#### and a number"]),
        ("a.jsonl", '{"question": null, "answer": "#### 3"}\n', ["a.jsonl: row 1", "`question` and `answer`"]),
        ("a.jsonl", "3\n", ["a.jsonl: row 1"]),
        ("a.jsonl", '{"question": "\\ud800", "answer": "#### 1"}\n', ["a.jsonl: row 1 is not of GSM8K"]),
        ("a.jsonl", "{\n", ["a.jsonl: cannot be read"]),
        ("a.parquet", "nonsense", ["a.parquet: cannot be read"]),
        ("a.csv", "question,answer\n", ["holds no rows", ".parquet or .jsonl"]),
        ("a.jsonl", json.dumps(TRAIN[0]) + "\n", ["leaves no row for the", "split"]),
    ],
)
def test_rows_that_are_none_are_one_line(tmp_path: Path, name: str, content: str, fragments: list[str]) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError) as caught:
        Gsm8k(str(tmp_path))
    assert "\n" not in str(caught.value)
    assert [fragment for fragment in ("data.gsm8k.path", *fragments) if fragment not in str(caught.value)] == []


def test_seeds_beyond_the_rows_are_refused(folder: Path) -> None:
    words = ["data.task=gsm8k", f"data.gsm8k.path={folder}", "data.num_train_seeds=20", "data.problems_per_iteration=4"]
    assert tasks.of(resolve("tiny", [*words, "eval.num_ids=5"]).config).name == "gsm8k"
    more = resolve("tiny", [*words, "eval.num_ids=6"]).config
    found, line = contents.evaluation_problems(tasks.of(more), more)
    assert (len(found), line) == (5, "eval.num_ids = 6: 5 different problems; each counts once")
    with pytest.raises(ConfigError, match=r"data\.num_train_seeds = 21: gsm8k has 20 training rows"):
        tasks.of(resolve("tiny", [*words, "data.num_train_seeds=21"]).config)


def test_a_hub_that_gives_nothing_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "datasets.py").write_text("def load_dataset(*a, **k):\n    raise OSError('no network\\nat all')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"openai/gsm8k cannot be loaded: no network at all"):
        Gsm8k()
