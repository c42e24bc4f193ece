"""Texts that no model should write, judged by every task: none raises, takes long, or is carried out."""

from __future__ import annotations

import json
import os
import shutil
import string
import sys
import time
from functools import partial
from pathlib import Path

from benchmarks.torture import processes
from benchmarks.torture.records import Record
from benchmarks.torture.wild import Draws, mutated
from grpo_mlflow import tasks
from grpo_mlflow.config import resolve
from grpo_mlflow.errors import ConfigError
from grpo_mlflow.tasks import Task, gym
from grpo_mlflow.tasks.judged import objection
from grpo_mlflow.types import Problem

_LONG = 1_000_000  # characters of the longest: one of each task, each time
_SLOW = 2.0  # seconds of CPU that a text may take, and as many for each million characters
_PLANTED = "planted"
_OPEN, _CLOSE = "<SOLUTION>", "</SOLUTION>"
_OWN = "python:docs.reverse:Reverse"
_MIXED = ("arithmetic", "sat", "reasoning_gym/chain_sum")
_WORDS = r"""
1 - 1, 1,000 1. 1/ 1/0 1+ 1e 1e999999999 x= \boxed{ \boxed{1} \frac{1}{ \text{ { } [ ] ( ) () $ % * ** 9**9**9 **1** ' "
#### <think> </ < <solution> <SOLUTION> </SOLUTION> None True nan inf -inf null 0x1 1_0 [[ ]] U999999999 R2 N 0101
2020-01-01 23:59 yes no +-+- << >> ... ??? | a=1; f(x)= x**2 %s%n ${HOME} a,b,c twenty- a- &amp; <br> \x00 \ exec("")
"""
_PIECES = (
    *_WORDS.split(),
    *(" ", "0 1 ", "1 1/2 ", "1 km", "= ", "one hundred and ", "#### 1", "the answer is ", "answer =", "or ", "and 1 "),
    *("F10R' ", "up ", "A B C", '{"a": 1}', "[1, 2]", "{1: 2}", "(1, 2)", "January 1, 2020", "import os", "lambda: 0"),
    *("__import__('os').system('touch planted')", "open('planted','w')", "`touch planted`", "$(touch planted)"),
    *("\n", "\t", "\r", "\0", "\x1b[2J", "\u2028", "\ufeff", "\ud800", "\udfff", "e\u0301", "\u00a0", "\U0001f600"),
    *("\u0663", "\u00bd", "\u221e", "\u221a", "\u4e00\u4e8c", "\u216b", "\u0661/\u0662", "9" * 400, "(" * 40),
)


def names() -> list[str]:
    """Return all tasks, as `data.task` names them."""
    return ["arithmetic", "sat", "gsm8k", "mix", _OWN, *(f"{gym.PREFIX}{name}" for name in gym.generators())]


def run(folder: Path, number: int, seed: int, name: str, count: int) -> Record:
    """Let a task judge so many texts in a forked process; the folder stays where something is wrong."""
    record, began = Record(number, seed, f"texts: {name}", "", struck=True, count=count), time.monotonic()
    here = folder / f"t{number:06d}"
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir(parents=True)
    try:
        found = processes.answer(here, partial(_judged, here, name, f"{seed}/{number}", count))
        record.wrong = found["wrong"]
        record.figures = {"right": found["right"], "slowest": round(found["slowest"], 2)}
    except RuntimeError as error:
        record.wrong.append(f"{error}; the text is in at.txt")
    record.codes.append(int(bool(record.wrong)))
    record.seconds = round(time.monotonic() - began, 2)
    if not record.wrong:
        shutil.rmtree(here)
    return record


def task_of(name: str, folder: Path) -> Task:
    """Return a task with few rows, seeds and settings."""
    rows = folder / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"question": f"q{i}", "answer": f"x\n#### {7000 + i}"}) + "\n" for i in range(300))
    )
    words = [f"data.task={name}", "data.num_train_seeds=100", "eval.num_ids=4"]
    if name == "gsm8k":
        words.append(f"data.gsm8k.path={rows}")
    if name == "mix":
        words.append(f"data.mix={{{', '.join(f'{task}: 1' for task in _MIXED)}}}")
    return tasks.of(resolve("tiny", words).config)


def _judged(folder: Path, name: str, seed: str, count: int) -> dict[str, object]:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    task, wrong, draws = task_of(name, folder), list[str](), Draws(seed)
    slowest, right = 0.0, 0
    problems = [task.problem("train", draws.randrange(100)) for _ in range(8)]
    for each in range(count):
        problem = draws.choice(problems)
        text = _text(draws, _answer(task, problem), longest=each == 0)
        (folder / "at.txt").write_bytes(text.encode(errors="surrogatepass"))  # if it ends the process, it is kept
        began = time.process_time()
        try:
            verdict = task.verify(problem, text)
            what = objection(verdict)
            right += verdict.success
        except BaseException as error:
            what = f"raised {type(error).__name__}: {error}"[:300]
        seconds = time.process_time() - began
        slowest = max(slowest, seconds)
        if seconds > _SLOW * (1 + len(text) / _LONG):
            what = f"took {seconds:.1f} s of CPU"
        if os.path.exists(_PLANTED):
            what = "was executed"
        if what:
            wrong.append(f"{each}: {problem.id}: {what}: {text[:200]!r}")
            shutil.copyfile(folder / "at.txt", folder / f"wrong-{each}.txt")
    return {"wrong": wrong, "right": int(right), "slowest": slowest}


def _answer(task: Task, problem: Problem) -> str:
    try:
        return task.reference_answer(problem)
    except ConfigError:  # some generators have no answers of their own
        return "1"


def _text(draws: Draws, answer: str, *, longest: bool) -> str:
    """Return a text: pieces, a right answer after an accident, or letters of any kind; often as the final answer."""
    size = _LONG if longest else int(10 ** draws.uniform(0, 3.7))
    kind = draws.random()
    if kind < 0.25 or longest:
        piece = draws.choice(_PIECES)
        text = piece * (1 + size // len(piece))
    elif kind < 0.5:
        text = "".join(draws.choice(_PIECES) for _ in range(1 + size // 20))
    elif kind < 0.85:
        inside = answer.removeprefix(_OPEN).removesuffix(_CLOSE)
        for _ in range(draws.randint(1, 4)):
            at = draws.randint(0, len(inside))
            inside = (
                mutated(inside, draws) if draws.random() < 0.6 else inside[:at] + draws.choice(_PIECES) + inside[at:]
            )
        text = inside[:_LONG]
    elif kind < 0.95:
        text = "".join(map(chr, draws.choices(range(0x110000), k=1 + size // 10)))
    else:
        text = "".join(draws.choices(string.printable, k=1 + size // 4))
    form = draws.random()
    if form < 0.55:
        return f"{_OPEN}{text}{_CLOSE}"
    return (
        text
        if form < 0.8
        else draws.choice((f"{_OPEN}{text}", f"{text}{_CLOSE}", f"1{text}1", f"#### {text}", text + answer))
    )
