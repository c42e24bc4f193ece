"""The commands that README.md and docs/ show: found, taken apart, and told from one another."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml

from tests.support.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# What a line of a code block, or an inline code of several words, begins with when it is a command.
_PROGRAMS = (
    "python3?|mlflow|make|pip3?|uv|torchrun|accelerate|srun|sbatch|kubectl|docker|curl|git|time|nvidia-smi|vllm|hf"
)
_COMMAND = re.compile(rf"(\$ )?([A-Z_]+=\S+ +)*([\w./-]+/)?({_PROGRAMS})\s+\S.*", re.DOTALL)
_SHELLS = ("bash", "sh", "shell", "console")
_MENTIONS = {"mlflow run", "python -m", "accelerate launch"}  # named, not meant to be typed


@dataclass(frozen=True, slots=True)
class Command:
    """One command of the docs: the words of the shell, without the assignments before them."""

    where: str
    text: str
    variables: Mapping[str, str]
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


def parse(text: str, where: str) -> Command:
    words = shlex.split(text.replace("\\\n", " ").removeprefix("$ "), comments=True)
    variables: dict[str, str] = {}
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0], re.DOTALL):
        name, _, variables[name] = words.pop(0).partition("=")
    if words and words[0] == "time":
        words.pop(0)
    return Command(where, shlex.join(shlex.split(text.replace("\\\n", " "), comments=True)), variables, tuple(words))


def _blocks(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield the code blocks of a page: line, language (empty where none is said), content."""
    lines, number = text.splitlines(), 0
    while number < len(lines):
        start = number
        if fence := re.match(r" *(```+|~~~+) *(\w*)", lines[number]):
            number += 1
            while number < len(lines) and not lines[number].strip().startswith(fence[1]):
                number += 1
            yield start + 2, fence[2], "\n".join(line.strip() for line in lines[start + 1 : number])
            number += 1
        elif lines[number].startswith("    ") and (number == 0 or not lines[number - 1].strip()):
            while number < len(lines) and (lines[number].startswith("    ") or not lines[number].strip()):
                number += 1
            yield start + 1, "", "\n".join(line[4:] for line in lines[start:number])
        else:
            number += 1


def _logical_lines(block: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of a shell block with their numbers, those that end with a backslash joined to the next."""
    parts: list[str] = []
    for number, line in enumerate(block.splitlines()):
        parts.append(line)
        if not line.endswith("\\"):
            if text := "\n".join(parts).strip():
                yield number + 1 - len(parts), text
            parts = []


def commands_of(text: str, page: str) -> list[Command]:
    """Return the commands of a page, in code blocks and in inline code (table cells too)."""
    found, prose = [], text
    for line, language, content in _blocks(text):
        prose = prose.replace(content, "")
        lines = [(n, each) for n, each in _logical_lines(content) if not each.startswith("#")]
        if language in _SHELLS or (not language and lines and _COMMAND.fullmatch(lines[0][1])):
            found += [parse(each, f"{page}:{line + number}") for number, each in lines]
    for match in re.finditer(r"`([^`]+)`", re.sub(r"```.*?```", "", prose, flags=re.DOTALL)):
        span = " ".join(match[1].split())
        if _COMMAND.fullmatch(span) and span not in _MENTIONS:
            found.append(parse(span, page))
    return found


def every_command() -> list[Command]:
    """Return the commands of all pages, each once."""
    found: dict[tuple[Any, ...], Command] = {}
    for page in PAGES:
        for command in commands_of(page.read_text(), str(page.relative_to(ROOT))):
            found.setdefault((tuple(command.variables.items()), command.words), command)
    return list(found.values())


@cache
def _entry_points() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]
    return content


def through_mlproject(words: Sequence[str]) -> list[str]:
    """Return the `python -m entrypoints.NAME ...` that an `mlflow run` command starts, as MLflow puts it together.

    Raises:
        ValueError: a word that these tests do not know, or an entry point that the project does not have.
    """
    entry, given, rest = "main", dict[str, str](), list(words[2:])
    while rest:
        word = rest.pop(0)
        option, equals, value = word.partition("=")
        if word == ".":
            continue
        if option not in ("-e", "-P", "--entry-point", "--env-manager", "--experiment-name"):
            raise ValueError(f"mlflow run: unknown option {word!r}")
        value = value if equals else rest.pop(0)
        if option in ("-e", "--entry-point"):
            entry = value
        elif option == "-P":
            key, equals, value = value.partition("=")
            if not equals or key in given:
                raise ValueError(f"mlflow run: -P {key}: without a value, or twice")
            given[key] = value
    if entry not in _entry_points():
        raise ValueError(f"mlflow run: no entry point {entry!r}; allowed: {', '.join(_entry_points())}")
    declared = {name: str(each["default"]) for name, each in _entry_points()[entry]["parameters"].items()}
    values = declared | given
    command = [word.format(**values) for word in shlex.split(_entry_points()[entry]["command"])]
    for key in (key for key in given if key not in declared):
        command += [f"--{key}", given[key]]
    return command


def keys_in_code(text: str, sections: Sequence[str]) -> list[str]:
    """Return the dotted names of settings that stand in the code of a page."""
    code = [content for _, _, content in _blocks(text)] + re.findall(r"`([^`]+)`", text)
    names = re.compile(rf"(?<![\w./\-@])((?:{'|'.join(sections)})(?:\.[a-z_0-9]+)+)(?![\w/(-])(?!\.\w)")
    return [name for part in code for name in names.findall(part)]
