"""The layout of docs/architecture.md: imports only go down, and no piece of code is too long to take in."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGE, SHIMS = "grpo_mlflow", "entrypoints"
# From the bottom up: each imports from itself and from those before it.
FLOORS = (
    *(
        "serverside",
        "redaction",
        "errors",
        "program",
        "types",
        "seeding",
        "algorithm",
        "forward",
        "config",
        "runtime",
        "tasks",
        "tracking",
    ),
    *("model", "generation", "training", "runs", "search", "cli", "__main__"),
)
# The one package that may import each of these libraries; elsewhere they are reached through it.
OWNERS = {"mlflow": "tracking", "optuna": "search", "openai": "runtime", "aiohttp": "runtime"}
MOST_LINES, MOST_LINES_OF_A_FUNCTION, MOST_POSITIONAL = 300, 50, 6


def unit_of(path: Path) -> str:
    """Return the floor that a file stands on; empty for the root `__init__`."""
    parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def imports(source: str, package: str) -> set[str]:
    """Return every dotted name that a source imports, also inside functions; `package` is where it stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def wrong_arrows(unit: str, names: set[str]) -> list[str]:
    """Return the imports that the layout forbids to `unit`."""
    wrong = []
    for name in sorted(names):
        root, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if root in OWNERS:
            allowed = unit == OWNERS[root]
        elif root == PACKAGE:
            below = unit in FLOORS and target in FLOORS and FLOORS.index(target) < FLOORS.index(unit)
            allowed = below or target in (unit, "__version__")
        else:
            allowed = root != SHIMS
        if not allowed:
            wrong.append(f"{unit or '__init__'} imports {name}")
    return wrong


def too_long(source: str) -> list[str]:
    """Return the functions with too many lines or positional parameters; records, which are all fields, have none."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or 0) - node.lineno + 1
            own = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
            positional = [name for name in own if name not in ("self", "cls")]
            if lines > MOST_LINES_OF_A_FUNCTION:
                found.append(f"{node.name} has {lines} lines")
            if node.name == "__init__" and len(positional) > MOST_POSITIONAL:
                found.append(f"{node.name} in line {node.lineno} has {len(positional)} positional parameters")
    return found


def _sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def _names(path: Path) -> set[str]:
    return imports(path.read_text(), ".".join(path.parent.relative_to(ROOT).parts))


def _id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_module_has_a_floor() -> None:
    assert {unit_of(path) for path in _sources(PACKAGE)} == {"", *FLOORS}


@pytest.mark.parametrize("path", _sources(PACKAGE), ids=_id)
def test_imports_only_go_down(path: Path) -> None:
    assert wrong_arrows(unit_of(path), _names(path)) == []


@pytest.mark.parametrize("path", _sources(SHIMS), ids=_id)
def test_the_modules_that_launchers_start_only_call_commands(path: Path) -> None:
    assert all(name.startswith(f"{PACKAGE}.cli.") for name in _names(path))
    assert len(path.read_text().splitlines()) < 12


@pytest.mark.parametrize("path", [*_sources(PACKAGE), *_sources("benchmarks"), *_sources("docs")], ids=_id)
def test_nothing_is_too_long(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= MOST_LINES
    assert too_long(source) == []


@pytest.mark.parametrize("path", _sources("tests"), ids=_id)
def test_no_test_file_imports_another(path: Path) -> None:
    elsewhere = {name for name in _names(path) if name.startswith("tests.") and not name.startswith("tests.support.")}
    assert elsewhere == set()


@pytest.mark.parametrize(
    ("unit", "source"),
    [
        ("algorithm", "from grpo_mlflow.config import Config"),
        ("forward", "from grpo_mlflow import config"),
        ("forward", "import grpo_mlflow.model.policy"),
        ("seeding", "from grpo_mlflow.algorithm.losses import log_ratio"),
        ("config", "from grpo_mlflow.tasks import TASKS"),
        ("tasks", "from grpo_mlflow.model import policy"),
        ("model", "def f():\n    from grpo_mlflow.training.rollouts import collect"),
        ("training", "import mlflow.artifacts"),
        ("runs", "import mlflow"),
        ("runs", "import optuna"),
        ("training", "if TYPE_CHECKING:\n    from grpo_mlflow.runs import train"),
        ("generation", "from aiohttp import ClientSession"),
        ("tasks", "from entrypoints import train"),
        ("training", "from grpo_mlflow import not_a_module"),
        ("", "from grpo_mlflow import config"),
    ],
)
def test_a_wrong_import_is_seen(unit: str, source: str) -> None:
    assert len(wrong_arrows(unit, imports(source, PACKAGE))) == 1


@pytest.mark.parametrize(
    ("unit", "source"),
    [
        ("model", "from grpo_mlflow.model.policy import Policy"),
        ("training", "from grpo_mlflow import seeding, tasks"),
        ("algorithm", "from grpo_mlflow.types import Group"),
        ("runtime", "from types import FrameType"),
        ("algorithm", "from statistics import NormalDist"),
        ("tracking", "import mlflow"),
    ],
)
def test_a_right_import_passes(unit: str, source: str) -> None:
    assert wrong_arrows(unit, imports(source, PACKAGE)) == []


def test_what_is_too_long_is_seen() -> None:
    body = "\n".join(f"    x = {i}" for i in range(MOST_LINES_OF_A_FUNCTION))
    assert too_long(f"def f():\n{body}") == [f"f has {MOST_LINES_OF_A_FUNCTION + 1} lines"]
    assert len(too_long("class A:\n    def __init__(self, a, b, c, d, e, f, g): ...")) == 1
    assert too_long("class A:\n    def __init__(self, a, b, c, d, e, f, *, g): ...") == []
