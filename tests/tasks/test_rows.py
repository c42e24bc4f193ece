"""Rows of the user's own: every kind of file, prompts and answers from columns, and one line for what is damaged."""

from __future__ import annotations

import csv
import datetime
import json
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from grpo_mlflow import tasks
from grpo_mlflow.cli import train
from grpo_mlflow.config import resolve
from grpo_mlflow.config.schema import RowsConfig
from grpo_mlflow.errors import ConfigError, UserError
from grpo_mlflow.tasks import Rows, contents
from grpo_mlflow.tasks.settings import task_settings
from grpo_mlflow.types import Split

Record = dict[str, Any]
SPLITS: tuple[Split, ...] = ("train", "eval")
ROWS: list[Record] = [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(40)]


def jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in rows))
    return str(path)


def table(path: object, **settings: Any) -> Rows:
    return Rows(RowsConfig(path=str(path), **settings))


def problems(task: Rows, split: Split) -> dict[str, Any]:
    """Return the answers of a split by their prompts, of as many seeds as rows."""
    count = len(task.table.rows[split])
    found = [task.problem(split, 1000 + seed) for seed in range(count)]
    return {each.messages[-1]["content"]: each.payload["answer"] for each in found}


def both(task: Rows) -> dict[str, Any]:
    return problems(task, "train") | problems(task, "eval")


EXPECTED = {row["prompt"]: row["answer"] for row in ROWS}


def write_csv(path: Path, rows: list[Record], **options: Any) -> None:
    with path.open("w", newline="", encoding=options.pop("encoding", "utf-8")) as stream:
        writer = csv.DictWriter(stream, list(rows[0]), **options)
        writer.writeheader()
        writer.writerows(rows)


def as_files(folder: Path) -> dict[str, Path]:
    lines = [json.dumps(row) for row in ROWS]
    files: dict[str, bytes] = {
        "plain.jsonl": "\n".join(lines).encode(),
        "crlf.jsonl": "\r\n".join([*lines, "", ""]).encode(),
        "bom.jsonl": b"\xef\xbb\xbf" + "\n".join(lines).encode(),
        "list.json": json.dumps(ROWS, indent=1).encode(),
        "bom.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
        "one_key.json": json.dumps({"data": ROWS}).encode(),
        "version.json": json.dumps({"version": "1", "authors": [], "rows": ROWS}).encode(),
        "lines.json": "\n".join(lines).encode(),
        "UPPER.JSONL": "\n".join(lines).encode(),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    write_csv(folder / "comma.csv", ROWS, lineterminator="\r\n")
    write_csv(folder / "bom.csv", ROWS, encoding="utf-8-sig")
    write_csv(folder / "semicolon.csv", ROWS, delimiter=";")
    write_csv(folder / "tab.csv", ROWS, delimiter="\t", quoting=csv.QUOTE_ALL)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "plain.parquet", row_group_size=7)
    return {path.name: path for path in folder.iterdir()}


FILES = (
    *("plain.jsonl", "crlf.jsonl", "bom.jsonl", "list.json", "bom.json", "one_key.json", "version.json", "lines.json"),
    *("UPPER.JSONL", "comma.csv", "bom.csv", "semicolon.csv", "tab.csv", "plain.parquet"),
)


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_problems(name: str, tmp_path: Path) -> None:
    task = table(as_files(tmp_path)[name])
    reference = table(jsonl(tmp_path / "reference.jsonl", ROWS))
    assert both(task) == EXPECTED
    assert [task.problem("eval", seed) for seed in range(9)] == [reference.problem("eval", seed) for seed in range(9)]
    assert task.table.digests == reference.table.digests


def hub(monkeypatch: pytest.MonkeyPatch, load_dataset: Callable[..., Any]) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


def test_rows_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, config: str) -> dict[str, list[Record]]:
        assert (name, config) == ("org/name", "main")
        rows = [{"prompt": f"What is {n}?", "answer": str(n)} for n in range(12)]
        return {"train": rows[:9], "test": rows[8:]}

    hub(monkeypatch, load_dataset)
    task = table("org/name:main")
    assert len(problems(task, "train")) == 8
    assert set(problems(task, "eval").values()) == {"8", "9", "10", "11"}
    assert task.table.shared == 1


def test_a_hub_that_gives_nothing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str) -> None:
        raise OSError("no network\nat all")

    hub(monkeypatch, load_dataset)
    with pytest.raises(UserError, match=r"^data\.rows\.path: org/other cannot be loaded: no network at all$"):
        table("org/other")


def test_without_the_hubs_package_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"data\.rows\.path = 'org/name': .* after pip install datasets a hub id"):
        resolve("tiny", ["data.task=rows", "data.rows.path=org/name"])


# Prompts and answers


@pytest.mark.parametrize(
    ("prompt", "row", "content"),
    [
        ("question", {"question": "Why?"}, "Why?"),
        ("{question} Think first.", {"question": "Why?"}, "Why? Think first."),
        ("{a} and {b}: {{x}}", {"a": 3, "b": 2.5}, "3 and 2.5: {x}"),
        ("{a}", {"a": 3.0}, "3"),
        ("{a}{b}", {"a": "{b}", "b": "!"}, "{b}!"),  # what a row holds is no template
        ("{list}", {"list": ["é", 1]}, '["é", 1]'),
        ("data.question", {"data": {"question": "Why?"}}, "Why?"),
        ("{data.question}?", {"data": {"question": "Why"}}, "Why?"),
        ("a.b", {"a.b": "flat", "a": {"b": "nested"}}, "flat"),
        ("{odd}", {"{odd}": "a column of this name", "odd": "no"}, "a column of this name"),
        ("two words", {"two words": "  kept as it is\n"}, "  kept as it is\n"),
    ],
)
def test_a_prompt_is_a_column_or_a_template(prompt: str, row: Record, content: str, tmp_path: Path) -> None:
    others = [{**row, "answer": 1}, *(dict.fromkeys(row, f"{i}") for i in range(6))]
    if "." in prompt and "data" in row:
        others = [row, *({"data": {"question": f"{i}"}} for i in range(6))]
    task = table(jsonl(tmp_path / "a.jsonl", [{**each, "answer": "1"} for each in others]), prompt=prompt)
    asked = {
        task.problem(split, n).messages[0]["content"]: task.problem(split, n) for split in SPLITS for n in range(9)
    }
    found = asked[content]
    assert found.messages == ({"role": "user", "content": content},)
    assert found.payload["columns"] == {**others[0], "answer": "1"}
    assert not found.payload["conversational"]


def test_a_prompt_of_chat_messages(tmp_path: Path) -> None:
    def chat(n: int) -> list[Record]:
        return [
            {"role": "system", "content": "Be brief.", "name": None},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": f"What is {n}?"},
        ]

    task = table(jsonl(tmp_path / "a.jsonl", [{"prompt": chat(n), "answer": n} for n in range(20)]))
    problem = task.problem("train", 0)
    number = problem.payload["answer"]
    assert problem.messages == tuple({"role": each["role"], "content": each["content"]} for each in chat(number))
    assert problem.payload["conversational"]
    assert problem.payload["columns"] == {"prompt": chat(number), "answer": number}


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        ("Paris", ["paris", " PARIS\n", "It is <SOLUTION>Paris</SOLUTION>."], ["It is Paris.", "", "Pari"]),
        (4, ["4"], ["4.0", "5"]),
        (4.0, ["4"], ["4.5"]),
        (True, ["true", "True"], ["1"]),
        (["USA", "United States"], ["usa", "united  states"], ["USA, United States"]),
    ],
)
def test_the_right_answer_of_a_row(answer: Any, right: list[str], wrong: list[str], tmp_path: Path) -> None:
    task = table(
        jsonl(tmp_path / "a.jsonl", [{"q": f"{n}?", "key": answer} for n in range(9)]), prompt="q", answer="key"
    )
    problem = task.problem("train", 5)
    assert problem.payload["answer"] == answer
    assert task.verify(problem, task.reference_answer(problem)).success
    assert [task.verify(problem, text).reward for text in (*right, *wrong)] == [1.0] * len(right) + [0.0] * len(wrong)


def test_rows_without_answers_have_none(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": f"Write {n} lines."} for n in range(9)])
    length = resolve("tiny", ["data.task=rows", f"data.rows.path={path}", "data.rewards={length: {at_most: 5}}"])
    task = tasks.of(tasks.fitted(length).config)
    problem = task.problem("train", 0)
    assert problem.payload["answer"] is None
    with pytest.raises(ConfigError, match=r"data\.rows\.answer = null: the rows have no answers"):
        task.reference_answer(problem)


def test_problems_are_what_json_holds(tmp_path: Path) -> None:
    """Rollouts keep them; dates and decimals of a table become texts, and bytes and nan, which JSON lacks, null."""
    day = datetime.date(2020, 2, 29)
    rows = [
        {
            "prompt": f"{n}?",
            "answer": Decimal("1.10"),
            "day": day,
            "raw": b"\xff",
            "nan": float("nan"),
            "sub": {"x": [1]},
        }
        for n in range(9)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    problem = table(tmp_path / "a.parquet").problem("train", 0)
    assert json.loads(json.dumps(problem.payload, allow_nan=False)) == problem.payload
    columns = problem.payload["columns"]
    assert (columns["day"], columns["raw"], columns["nan"], columns["sub"]) == ("2020-02-29", None, None, {"x": [1]})
    assert problem.payload["answer"] == "1.10"


# Splits


def test_a_pass_of_seeds_names_each_row_once_whatever_the_first(tmp_path: Path) -> None:
    task = table(jsonl(tmp_path / "a.jsonl", ROWS))
    count = len(task.table.rows["train"])
    for first in (0, 1, 1000, 4999):
        prompts = [task.problem("train", first + n).messages[0]["content"] for n in range(count)]
        assert len(set(prompts)) == count
        assert prompts != sorted(prompts, key=list(EXPECTED).index)  # a file may be sorted


def test_a_row_keeps_its_split_when_others_are_added(tmp_path: Path) -> None:
    few, many = (table(jsonl(tmp_path / f"{n}.jsonl", ROWS[:n])) for n in (30, 40))
    for split in SPLITS:
        assert problems(few, split).keys() <= problems(many, split).keys()
    half = table(tmp_path / "40.jsonl", eval_share=0.5)
    assert problems(many, "eval").keys() < problems(half, "eval").keys()


@pytest.mark.parametrize("count", [3, 4, 6])
def test_few_rows_leave_two_to_evaluate(count: int, tmp_path: Path) -> None:
    task = table(jsonl(tmp_path / "a.jsonl", ROWS[:count]), eval_share=0.01)
    assert [len(task.table.rows[split]) for split in SPLITS] == [count - 2, 2]


def test_equal_questions_count_once_and_evaluation_keeps_them(tmp_path: Path) -> None:
    (tmp_path / "Train.JSONL").write_text("")
    jsonl(
        tmp_path / "Train.JSONL",
        [
            *({"prompt": text, "answer": "1"} for text in ("One?", "ONE? ", "Two?", "two?", " both\n?")),
            {"prompt": "Two?", "answer": "2"},
        ],
    )
    jsonl(tmp_path / "my-eval.jsonl", [{"prompt": text, "answer": "1"} for text in ("Both ?", "Three?", "THREE?")])
    task = table(tmp_path)
    assert problems(task, "train") == {"One?": "1", "Two?": "1"}
    assert problems(task, "eval").keys() == {"Both ?", "Three?"}
    left_out = "4 duplicates, 1 of them with another answer, 1 also in evaluation, so not trained on"
    assert task.table.counts() == f"4 distinct ({left_out}), 2 train, 2 evaluation"


@pytest.mark.parametrize(
    ("files", "train_rows", "eval_rows"),
    [
        ({"train": [1, 2], "test": [3, 4], "validation": [5], "other": [6]}, {1, 2}, {3, 4}),
        ({"train": [1, 2], "validation": [3, 4], "other": [5]}, {1, 2}, {3, 4}),
        ({"questions": [1, 2], "test": [3, 4]}, {1, 2}, {3, 4}),  # a test file is never trained on
        ({"TRAINING": [1, 2], "my.Eval": [3, 4]}, {1, 2}, {3, 4}),
    ],
)
def test_names_of_files_tell_their_split(
    files: dict[str, list[int]], train_rows: set[int], eval_rows: set[int], tmp_path: Path
) -> None:
    for name, numbers in files.items():
        jsonl(tmp_path / f"{name}.jsonl", [{"prompt": f"{n}?", "answer": n} for n in numbers])
    task = table(tmp_path)
    assert (set(problems(task, "train").values()), set(problems(task, "eval").values())) == (train_rows, eval_rows)


def test_eval_path_names_the_rows_to_evaluate(tmp_path: Path) -> None:
    mine = jsonl(tmp_path / "mine.jsonl", ROWS[:10])
    other = jsonl(tmp_path / "other.jsonl", ROWS[8:12])
    task = table(mine, eval_path=other)
    assert [len(task.table.rows[split]) for split in SPLITS] == [8, 4]
    assert problems(task, "eval") == {row["prompt"]: row["answer"] for row in ROWS[8:12]}


# Sizes


def fitted(path: Path, *words: str) -> Any:
    return tasks.fitted(resolve("tiny", ["data.task=rows", f"data.rows.path={path}", *words]))


def test_a_path_of_rows_is_enough_to_learn_from_them(tmp_path: Path) -> None:
    words = [f"data.rows.path={jsonl(tmp_path / 'a.jsonl', ROWS)}"]
    found = resolve("tiny", words)
    assert found.config.data.task == "rows"
    assert found.warnings == ("data.task = 'rows', not 'arithmetic' (preset tiny): data.rows.path names rows",)
    chosen = resolve("tiny", [*words, "data.task=sat"])
    assert chosen.config.data.task == "sat"
    assert chosen.warnings == ("data.rows.path has no effect: data.task is sat",)


def test_sizes_that_nobody_chose_fit_the_rows(tmp_path: Path) -> None:
    path = Path(jsonl(tmp_path / "a.jsonl", ROWS))
    found = fitted(path)
    count = len(table(path).table.rows["train"])
    assert (found.config.data.num_train_seeds, found.config.data.problems_per_iteration) == (count, count)
    assert f"data.num_train_seeds = {count}, not 4096 (preset tiny): there are {count} training rows" in found.warnings
    chosen = fitted(path, "data.num_train_seeds=8", "data.problems_per_iteration=4")
    assert (chosen.config.data.num_train_seeds, chosen.config.data.problems_per_iteration) == (8, 4)


def test_all_rows_are_trained_on_unless_somebody_chose_fewer(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": f"{n}?", "answer": n} for n in range(6000)])
    found = fitted(Path(path))
    assert found.config.data.num_train_seeds == len(table(path).table.rows["train"]) > 4096
    plain = tasks.fitted(resolve("", ["model.train_id=a/b", "data.task=rows", f"data.rows.path={path}"])).config
    assert plain.data.num_train_seeds == len(table(path).table.rows["train"])  # 64 in the schema
    assert plain.eval.id_seed_start >= plain.data.train_seed_start + plain.data.num_train_seeds


def test_more_training_seeds_than_rows_are_refused(tmp_path: Path) -> None:
    path = Path(jsonl(tmp_path / "a.jsonl", ROWS))
    count = len(table(path).table.rows["train"])
    with pytest.raises(
        ConfigError, match=rf"data\.num_train_seeds = 41: rows has {count} training rows; allowed: 1 to"
    ):
        fitted(path, "data.num_train_seeds=41", "data.problems_per_iteration=4")
    with pytest.raises(ConfigError, match=rf"data\.problems_per_iteration = 41: more than .* = {count}; allowed: 1 to"):
        fitted(path, "data.problems_per_iteration=41")


def test_a_measured_model_needs_no_training_rows(tmp_path: Path) -> None:
    """The settings of a run may be those of a larger file."""
    path = Path(jsonl(tmp_path / "a.jsonl", ROWS[:12]))
    stored = {**resolve("tiny").config.model_dump(mode="json")}
    words = ["data.task=rows", f"data.rows.path={path}"]
    with pytest.raises(ConfigError, match=r"data\.num_train_seeds = 4096"):
        tasks.fitted(resolve("", words, base=stored, origin="run 1"))
    found = tasks.fitted(resolve("", words, base=stored, origin="run 1"), trains=False).config.data
    assert found.num_train_seeds == found.problems_per_iteration == len(table(path).table.rows["train"])


def test_evaluation_counts_its_rows_once(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", ROWS[9:])
    jsonl(tmp_path / "test.jsonl", ROWS[:9])
    config = fitted(tmp_path, "eval.num_ids=256").config
    found, line = contents.evaluation_problems(tasks.of(config), config)
    assert (len(found), line) == (9, "eval.num_ids = 256: 9 different problems; each counts once")
    assert fitted(tmp_path, "eval.num_ids=9").config.eval.num_ids == 9
    config = fitted(tmp_path, "eval.num_ids=9").config
    assert len(contents.evaluation_problems(tasks.of(config), config)[0]) == 9


def test_a_file_that_changes_is_read_again_and_makes_another_embedded_model(tmp_path: Path) -> None:
    path = Path(jsonl(tmp_path / "a.jsonl", ROWS))
    config = fitted(path).config
    before = task_settings(config)
    assert task_settings(config) == before
    jsonl(path, [{**row, "answer": row["answer"] + "0"} for row in ROWS])
    assert both(table(path)) == {prompt: answer + "0" for prompt, answer in EXPECTED.items()}
    assert task_settings(config) != before


# Damage: one line with file and row

ROW = '{"prompt": "a?", "answer": "1"}'
DAMAGED: list[tuple[str, bytes, list[str], list[str]]] = [
    ("cut.jsonl", f"{ROW}\n{ROW[:-5]}".encode(), [], ["row 2: is no JSON", "one JSON object per line"]),
    ("indented.jsonl", json.dumps(ROWS, indent=1).encode(), [], ["row 1: is no JSON", "one JSON object per line"]),
    ("list.jsonl", f"{ROW}\n[1, 2]\n".encode(), [], ["row 2", "the row is [1, 2]", "an object with columns"]),
    ("number.jsonl", f"{ROW}\n17\n".encode(), [], ["row 2", "the row is 17"]),
    (
        "latin.jsonl",
        f"{ROW}\n".encode() + b'{"prompt": "\xe9", "answer": "1"}\n',
        [],
        ["row 2: is not UTF-8: byte 0xe9"],
    ),
    ("utf16.jsonl", ROW.encode("utf-16"), [], ["is UTF-16; allowed: UTF-8"]),
    ("nul.jsonl", f"{ROW}\n".encode() + b"\0\0\0\0\n", [], ["row 2: is no text: holds a NUL"]),
    ("deep.jsonl", b"[" * 100_000 + b"\n", [], ["row 1: is nested too deeply"]),
    ("digits.jsonl", b'{"prompt": "a", "answer": ' + b"1" * 5000 + b"}\n", [], ["row 1: ", "4300"]),
    ("surrogate.jsonl", b'{"prompt": "\\ud800", "answer": "1"}\n', [], ["row 1", "half of a surrogate pair"]),
    ("half.jsonl", b'{"prompt": "a", "answer": "1", "x": "\\ud800"}\n', [], ["row 1", "surrogates not allowed"]),
    ("null.jsonl", f'{ROW}\n{{"prompt": null, "answer": 1}}'.encode(), [], ["row 2: the column 'prompt' is null"]),
    ("nan.jsonl", b'{"prompt": "a", "answer": NaN}', [], ["data.rows.answer = 'answer'", "row 1", "'answer' is null"]),
    ("blank.jsonl", b'{"prompt": "  ", "answer": "1"}', [], ["row 1: the prompt is empty"]),
    ("noanswer.jsonl", b'{"prompt": "a", "answer": ""}', [], ["row 1: is ''; allowed: a text, a number, or a list"]),
    ("object.jsonl", b'{"prompt": "a", "answer": {"x": 1}}', [], ["row 1: is {'x': 1}; allowed: a text, a number"]),
    (
        "missing.jsonl",
        f'{ROW}\n{{"question": "b?"}}'.encode(),
        [],
        ["row 2", "no column 'prompt'", "there are: question"],
    ),
    (
        *("columns.jsonl", b'{"question": "b?", "gold": 1}', []),
        ["there are: question, gold", "data.rows.prompt=COLUMN", "'{question}'"],
    ),
    ("gold.jsonl", ROW.encode(), ["data.rows.answer=gold"], ["data.rows.answer = 'gold'", "there are: prompt, answer"]),
    ("field.jsonl", ROW.encode(), ["data.rows.prompt={a} {b}"], ["row 1: there is no column 'a'"]),
    ("brace.jsonl", ROW.encode(), ["data.rows.prompt={prompt"], ["data.rows.prompt = '{prompt'", "{{ for a brace"]),
    ("format.jsonl", ROW.encode(), ["data.rows.prompt={prompt!r:>9}"], ["{prompt!r:>9} is no column"]),
    ("dict.jsonl", b'{"prompt": {"text": "a"}, "answer": 1}', [], ["row 1: the column 'prompt' is {'text': 'a'}"]),
    ("chat.jsonl", b'{"prompt": ["a"], "answer": 1}', [], ["row 1: holds 'a'; allowed: objects with a role"]),
    ("empty_chat.jsonl", b'{"prompt": [], "answer": 1}', [], ["row 1: holds no message"]),
    (
        *("answered.jsonl", b'{"prompt": [{"role": "assistant", "content": "b"}], "answer": 1}', []),
        ["row 1: ends with a message of the assistant", "the last is the user's"],
    ),
    ("cut.json", json.dumps(ROWS).encode()[:-30], [], ["row 40: is no JSON"]),
    ("open.json", json.dumps(ROWS).encode()[:-1], [], ["row 40: is the last, and no ] follows"]),
    ("two.json", json.dumps(ROWS).encode() + b"[]", [], ["goes on after the end of its list"]),
    ("comma.json", b"[" + ROW.encode() + b" " + ROW.encode() + b"]", [], ["row 1", "something else than a comma"]),
    ("tables.json", json.dumps({"a": ROWS, "b": ROWS}).encode(), [], ["is no list of rows"]),
    ("deep.json", b'{"a": ' * 100_000, [], ["is nested too deeply"]),
    ("text.json", b'"rows"', [], ["is no list of rows"]),
    ("cells.csv", b"prompt,answer\na,1\nb\n", [], ["row 3: has 1 cells, the header 2"]),
    ("quote.csv", b'prompt,answer\na,1\n"b,2\n', [], ["row 3: unexpected end of data"]),
    ("twice.csv", b"prompt,prompt\na,1\n", [], ["row 1: the header names a column twice"]),
    ("header.csv", b"a,1\nb,2\n", [], ["row 2: there is no column 'prompt'; there are: a, 1"]),
    ("latin.csv", b"prompt,answer\na,1\n\xe9,2\n", [], ["row 3: is not UTF-8"]),
    ("empty_cell.csv", b"prompt,answer\na,1\nb,\n", [], ["row 3: is ''; allowed: a text"]),
    ("binary.parquet", b"PAR1 nonsense PAR1", [], ["cannot be read"]),
    ("empty.jsonl", b"", [], ["leaves no row for the train split"]),
    ("only_header.csv", b"prompt,answer\n", [], ["leaves no row for the train split"]),
    (
        *("unanswered.jsonl", b"".join(b'{"prompt": "%d?"}\n' % n for n in range(9)), []),
        ["data.rows.answer = null", "there are: prompt", "data.rewards that need no answer"],
    ),
    (
        *("some.jsonl", f"{ROW}\n".encode() + b"".join(b'{"prompt": "%d?"}\n' % n for n in range(9)), []),
        ["data.rows.answer = null", "row 2: there is no column 'answer'"],
    ),
    (
        "twice.jsonl",
        f"{ROW}\n".encode() + b'{"prompt": "a", "answer": "1", "answer": "2"}\n',
        [],
        ["row 2: ", "'answer'"],
    ),
    ("twice.json", b'[{"prompt": "a", "answer": "1", "answer": "2"}]', [], ["row 1: ", "'answer' is given twice"]),
    ("quote.csv", b'prompt,answer\n"a"b,1\n', [], ["row 2: "]),
    ("rows.txt", ROW.encode(), [], ["holds no rows", ".jsonl, .json, .csv or .parquet"]),
]


@pytest.mark.parametrize(("name", "content", "words", "fragments"), DAMAGED, ids=[each[0] for each in DAMAGED])
def test_what_is_damaged_is_one_line(
    name: str, content: bytes, words: list[str], fragments: list[str], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        train.main(["data.task=rows", f"data.rows.path={tmp_path / name}", *words])
    line = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in line
    of_a_setting = name in ("brace.jsonl", "format.jsonl")
    assert [each for each in ("data.rows.", "" if of_a_setting else name, *fragments) if each not in line] == []
    assert len(line) < 600


def test_a_parquet_file_that_breaks_off_in_the_middle_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS * 50), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + b"\0" * 200 + whole[300:])
    with pytest.raises(ConfigError, match=r"^data\.rows\.path: a\.parquet: cannot be read: .*$"):
        table(path)
