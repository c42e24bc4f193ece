"""Command lines and config files as nobody meant them: each is taken, or refused in one line for each mistake.

They go through what `train` and `optimize` do before anything is trained, and end as the commands end. What is taken
has to be written as YAML that reads back as the same.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from types import FrameType

from benchmarks.torture import processes
from benchmarks.torture.processes import MISTAKE
from benchmarks.torture.records import Record
from benchmarks.torture.wild import DIMENSIONS, VALUES, WORDS, Draws, mutated
from grpo_mlflow.cli import command, optimize, train
from grpo_mlflow.config import Resolved, dump, flatten, layers, resolve
from grpo_mlflow.config.keys import KEYS
from grpo_mlflow.config.schema import Config
from grpo_mlflow.redaction import HIDDEN

AT_ONCE = 250  # mutations of one process
_HANGS = 20  # seconds that one may take
_MOST_LINES, _MOST_CHARACTERS = 60, 100_000  # of what a command says of its mistakes
_DEFAULTS = flatten(Config().model_dump(mode="json"))
COMMANDS = {"train": train.checked, "optimize": optimize.checked}


class Hung(BaseException):
    """A mutation took too long."""


def run(folder: Path, number: int, seed: int, count: int) -> Record:
    """Try so many mutations in a forked process; the words of those that did not end as they should are kept."""
    record, began = Record(number, seed, "config: mutations", "", struck=True, count=count), time.monotonic()
    here = folder / f"m{number:06d}"
    here.mkdir(parents=True, exist_ok=True)
    try:
        record.wrong += processes.answer(here, partial(_tried, here, f"{seed}/{number}", count))
    except RuntimeError as error:  # not even that it took too long could be told: a loop of a library, or no memory
        record.wrong.append(f"{error} at {(here / 'at.json').read_text()}")
    record.codes.append(int(bool(record.wrong)))
    record.seconds = round(time.monotonic() - began, 2)
    if not record.wrong:
        shutil.rmtree(here)
    return record


def _tried(folder: Path, seed: str, count: int) -> list[str]:
    os.environ |= {"HF_HUB_OFFLINE": "1", "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    wrong = []
    for each in range(count):
        draws = Draws(f"{seed}/{each}")
        name, words = drawn(draws, folder)
        (folder / "at.json").write_text(json.dumps([each, name, words]))
        for fault in faults(name, words):
            shown = json.dumps([name, *words])
            wrong.append(f"{fault}: {shown if len(shown) < 2000 else f'{shown[:2000]}...'}")
            for file in folder.glob("*.yaml"):
                shutil.copyfile(file, folder / f"wrong-{each}-{file.name}.txt")
    return wrong


def drawn(draws: Draws, folder: Path) -> tuple[str, list[str]]:
    """Return a command and its words; a config file among them is written into the folder."""
    name = "optimize" if draws.random() < 0.25 else "train"
    words = [_override(draws) for _ in range(draws.choice((0, 1, 1, 1, 2, 3, 6)))]
    kind = draws.random()
    if kind < 0.35:
        words += ["--config", draws.choice(layers.presets())]
    elif kind < 0.6:
        words += ["--config", _file(draws, folder)]
    elif kind < 0.65:
        words += ["--config", draws.choice(WORDS)]
    if draws.random() < 0.1:
        words += ["--overrides", " ".join(_override(draws) for _ in range(draws.randint(1, 4)))]
    if draws.random() < 0.1:
        words.append(draws.choice(("--print-config", "--help", "--multirun", "-m", "--", "-", "--x", "--seed", "-h=1")))
    if name == "optimize" and draws.random() < 0.7:
        words += [f"--{draws.choice(list(optimize.OPTIONS))}", draws.choice(WORDS)]
    if name == "optimize" and draws.random() < 0.7:
        words.append(f"search.space={_space(draws)}")
    if draws.random() < 0.1:
        words = [mutated(word, draws) for word in words]
    draws.shuffle(words)
    return name, [word.replace("\0", "") for word in words]  # no word of a command line can hold a NUL


def faults(name: str, words: Sequence[str]) -> Iterator[str]:
    """Yield what is not as it should be in how a command ends with these words."""
    out, error = (io.TextIOWrapper(io.BytesIO(), "utf-8", kind) for kind in ("strict", "backslashreplace"))
    taken: list[Resolved] = []

    def main(argv: Sequence[str]) -> None:
        if found := COMMANDS[name](argv):
            taken.append(found[0])

    code: object = 0
    sys.argv[1:] = words
    try:
        with redirect_stdout(out), redirect_stderr(error), _bounded():
            command.run(main)
    except SystemExit as end:
        code = end.code or 0
    except Hung:
        yield f"took more than {_HANGS} seconds"
        return
    except BaseException as other:
        yield f"{type(other).__name__}: {other}"[:300]
        return
    error.seek(0)
    said = error.read().splitlines()
    if code not in (0, 1, 2):
        yield f"ended with {code}"
    if code and not any(line.startswith("error: ") and line.strip() != "error:" for line in said):
        yield f"ended with {code} and without a line: {said[:3]}"
    for line in said:
        if "Traceback" in line or MISTAKE in line:
            yield f"said {line[:300]}"
    if len(said) > _MOST_LINES or sum(map(len, said)) > _MOST_CHARACTERS:
        yield f"said {len(said)} lines of {sum(map(len, said))} characters"
    yield from _written(taken)


def _written(taken: Sequence[Resolved]) -> Iterator[str]:
    """Yield why the YAML of what was taken does not read back as the same."""
    for resolved in taken:
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", dir=".", encoding="utf-8") as file:
            try:
                text = dump(resolved.config)
                if HIDDEN in text:  # what looks like a password, and is not written
                    continue
                file.write(text)
                file.flush()
                again = resolve(file.name).config
            except Exception as other:
                yield f"its YAML is refused: {other}"[:300]
            else:
                if dump(again) != text:  # not of the configs: NaN, in a setting of a task, is no NaN's equal
                    yield "its YAML reads back as another"


@contextmanager
def _bounded() -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(_HANGS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _override(draws: Draws) -> str:
    key = draws.choice(list(KEYS))
    if draws.random() < 0.15:
        key = draws.choice(
            (mutated(key, draws), key.rpartition(".")[0], f"{key}.{key}", f"{key}.", draws.choice(WORDS))
        )
    value = _value(key, draws)
    form = draws.random()
    return (
        f"{key}={value}"
        if form < 0.9
        else f"--{key}={value}"
        if form < 0.97
        else draws.choice((key, f"--{key}", f"={value}"))
    )


def _value(key: str, draws: Draws) -> str:
    """Return a value: any of the wild ones, or one near the setting's own."""
    default = _DEFAULTS.get(key)
    if draws.random() < 0.5 or default is None:
        return draws.choice(VALUES)
    if isinstance(default, bool):
        return draws.choice(("true", "false", "True", "yes", "1", "0"))
    if isinstance(default, (int, float)):
        return str(
            draws.choice((default, default * 2, default + 1, default - 1, -default, default / 3, default * 10**6))
        )
    return mutated(json.dumps(default), draws)


def _space(draws: Draws) -> str:
    entries = [f"{draws.choice(list(KEYS))}={draws.choice(DIMENSIONS)}" for _ in range(draws.randint(1, 3))]
    return draws.choice(
        (" ".join(entries), mutated(" ".join(entries), draws), draws.choice(WORDS), "loss", "everything")
    )


def _file(draws: Draws, folder: Path) -> str:
    """Write a config file that was damaged somewhere, and return its name."""
    lines = dump(Config()).splitlines()
    for _ in range(draws.choice((0, 1, 1, 2, 5))):
        at = draws.randrange(len(lines))
        way = draws.randrange(6)
        if way == 0:
            lines[at] = mutated(lines[at], draws)
        elif way == 1:
            del lines[at]
        elif way == 2:
            lines.insert(at, draws.choice(lines))
        elif way == 3:
            lines[at] = f"{lines[at].partition(':')[0]}: {draws.choice(VALUES)}"
        elif way == 4:
            lines[at] = draws.choice(("  ", "\t", "")) + lines[at].strip()
        else:
            lines.insert(at, f"base: {draws.choice((*layers.presets(), *WORDS))}")
    content = "\n".join(lines).encode(errors="surrogatepass")
    if draws.random() < 0.1:
        content = draws.choice((b"", content[: draws.randrange(len(content))], b"\xff\xfe" + content, b"\0" * 100))
    (folder / "mutated.yaml").write_bytes(content)
    return "mutated.yaml"
