"""Judging takes time in proportion to a text, whatever the text: a model may write anything, for as long as it may."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from grpo_mlflow import tasks
from grpo_mlflow.config import resolve
from grpo_mlflow.tasks import Task

SIZE = 50_000  # characters: what is quadratic in them takes half a minute each
OPEN, CLOSE = "<SOLUTION>", "</SOLUTION>"
PIECES = (
    *(
        "1",
        " ",
        "-",
        "0 1 ",
        "1,",
        "1,000",
        "1.",
        "1/",
        "1 1/2 ",
        "1+",
        "1e",
        "1 ",
        "1 km",
        "1 million ",
        "x=",
        "= ",
        "٣",
    ),
    *("\\boxed{", "\\boxed{1}", "\\frac{1}{", "\\text{", "{", "(", "()", "$", "%", "*", "**1**", "'", "\n", "\t", "\0"),
    *("one hundred and ", "twenty-", "a-", "#### ", "#### 1", "the answer is ", "answer =", "<", "</", OPEN, CLOSE),
    *("<think>", "e\u0301", "\ud800", "\u00a0", "or ", "and 1 "),
)
NAMES = ("arithmetic", "sat", "gsm8k", "reasoning_gym/chain_sum", "reasoning_gym/countdown")


def texts() -> Iterator[str]:
    for piece in PIECES:
        many = piece * (SIZE // len(piece))
        yield from (many, f"{OPEN}{many}{CLOSE}", f"{OPEN}{many}x{CLOSE}", f"1{many}1", f"#### {many}")


@pytest.fixture(scope="module", params=NAMES)
def task(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Task:
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"question": f"q{i}", "answer": f"x\n#### {7000 + i}"}) + "\n" for i in range(300))
    )
    words = [f"data.task={request.param}", "data.num_train_seeds=100", "eval.num_ids=4"]
    if request.param == "gsm8k":
        words.append(f"data.gsm8k.path={rows}")
    return tasks.of(resolve("tiny", words).config)


def test_judging_is_linear(task: Task) -> None:
    problem = task.problem("train", 1)
    slowest = 0.0
    for text in texts():
        began = time.process_time()
        verdict = task.verify(problem, text)
        slowest = max(slowest, time.process_time() - began)
        assert not verdict.success
    assert slowest < 3  # seconds
