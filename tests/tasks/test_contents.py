"""Problems count by their content: seeds that repeat one do not make an evaluation larger or surer."""

from __future__ import annotations

import time

from grpo_mlflow import tasks
from grpo_mlflow.config import Config, resolve
from grpo_mlflow.tasks import contents
from grpo_mlflow.tasks.base import Task, split_of
from grpo_mlflow.types import Problem, Split, Verdict


class Rows(Task):
    """`rows` problems, which the seeds name modulo their number; training has those from `shared` on."""

    name = "rows"

    def __init__(self, rows: int = 9, shared: int = 9, seconds: float = 0.0) -> None:
        self.rows, self.shared, self.seconds = rows, shared, seconds

    def problem(self, split: Split, seed: int) -> Problem:
        time.sleep(self.seconds)
        row = seed % self.rows + (self.shared if split == "train" else 0)
        return Problem(f"rows/{split}/{seed}", seed, ({"role": "user", "content": str(row)},), {"answer": row})

    def verify(self, problem: Problem, text: str) -> Verdict:
        success = text == str(problem.payload["answer"])
        return Verdict(float(success), {}, success, text)

    def reference_answer(self, problem: Problem) -> str:
        return str(problem.payload["answer"])


def config(*words: str) -> Config:
    return resolve("tiny", ["eval.num_ids=256", "eval.id_seed_start=5000", *words]).config


def test_each_content_counts_once_and_a_line_says_so() -> None:
    found, line = contents.evaluation_problems(Rows(), config())
    assert [problem.seed for problem in found] == list(range(5000, 5009))
    assert line == "eval.num_ids = 256: 9 different problems; each counts once"
    assert contents.evaluation_problems(Rows(), config("eval.num_ids=9")) == (found, None)


def test_problems_differ_by_what_is_asked_or_by_how_it_is_judged() -> None:
    asked, other = {"role": "user", "content": "?"}, {"role": "system", "content": "?"}
    one = Problem("a", 1, (asked,), {"answer": 1})
    different = [one, Problem("b", 2, (asked,), {"answer": 2}), Problem("c", 3, (other,), {"answer": 1})]
    same = Problem("d", 4, (dict(asked),), {"answer": 1})
    assert contents.distinct([*different, same]) == different
    assert contents.distinct([same, *different], known=[one]) == different[1:]


def test_case_and_white_space_make_no_other_problem() -> None:
    texts = ("How many apples?", "how  many\tAPPLES?\n", "How many apples")
    one, same, other = (Problem(text, 1, ({"role": "user", "content": text},), {"answer": "A"}) for text in texts)
    judged = Problem("d", 4, one.messages, {"answer": "a"})  # the payload counts as it is
    assert contents.distinct([one, same, other, judged]) == [one, other, judged]
    assert split_of("rows", texts[0]) == split_of("rows", texts[1])
    assert len({split_of("rows", f"{text} {i}") for i in range(40) for text in texts[:1]}) == 2
    assert all(split_of("rows", f"{texts[0]} {i}") == split_of("rows", f"{texts[1]} {i}") for i in range(40))


def test_where_a_task_finds_a_problem_again_makes_no_other_problem() -> None:
    asked = {"role": "user", "content": "?"}
    one, same = (Problem(str(row), row, (asked,), {"answer": 1, "_row": row}) for row in range(2))
    assert contents.distinct([one, same]) == [one]


def test_fresh_problems_are_none_that_were_evaluated_before() -> None:
    found, line = contents.evaluation_problems(Rows(rows=300), config("eval.num_ids=100"), [range(5040, 5070)])
    kept = {problem.payload["answer"] for problem in found}
    assert kept == {row % 300 for row in (*range(5000, 5040), *range(5070, 5100))}
    assert line == ("eval.num_ids = 100: 70 different problems that were not evaluated before; each counts once")


def test_a_task_without_fresh_problems_has_its_own_again() -> None:
    found, line = contents.evaluation_problems(Rows(), config(), [range(100)])
    assert len(found) == 9
    assert line == "eval.num_ids = 256: the task has no fresh problems; 9 that were evaluated before count again"


def test_training_on_evaluation_problems_is_told_with_its_count() -> None:
    line = contents.overlap(Rows(rows=20, shared=12), config())
    assert line == "8 of 20 evaluation problems are also training problems"
    assert contents.overlap(Rows(), config()) is None
    bounded = contents.overlap(Rows(shared=0, seconds=0.001), config("eval.num_ids=9"), seconds=0.1)
    assert bounded is not None
    assert bounded.startswith("9 of 9 evaluation problems are also training problems (at least: ")
    assert bounded.endswith(" of 4096 training problems were looked at)")


def test_the_arithmetic_task_keeps_its_splits_apart() -> None:
    settings = config()
    found, line = contents.evaluation_problems(tasks.of(settings), settings)
    assert len({contents.content(problem) for problem in found}) == len(found) == 241
    assert line == "eval.num_ids = 256: 241 different problems; each counts once"
    assert contents.overlap(tasks.of(settings), settings) is None
