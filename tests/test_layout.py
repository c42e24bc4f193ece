"""The floors of docs/architecture.md: which module may import which, and how long a file may be."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, TOP = "grpo_mlflow", "entrypoints"

FLOORS: dict[str, int] = {
    **dict.fromkeys(["errors", "types", "config", "seeding", "advantages", "losses", "token_head", "schedules"], 0),
    **dict.fromkeys(["statistics", "interrupts", "heartbeat", "allocator", "serverside"], 0),
    **dict.fromkeys(
        [
            "tasks",
            "attention",
            "policy",
            "prefix_tree",
            "llama_pass",
            "shared_prefix",
            "tiny",
            "generation",
            "checkpoint",
            "tracking",
            "console",
            "processes",
        ],
        1,
    ),
    "lora": 1,
    **dict.fromkeys(["rollouts", "batching", "scoring", "sources", "models", "throughput"], 2),
    **dict.fromkeys(
        ["update", "evaluation", "collector", "trainer", "messages", "runs", "checkup", "doctor", "serve"], 3
    ),
    "search": 4,
}
SAME_FLOOR: dict[str, set[str]] = {
    "config": {"errors"},
    "policy": {"lora"},
    "prefix_tree": {"attention"},
    "llama_pass": {"attention", "prefix_tree"},
    "shared_prefix": {"policy", "attention", "prefix_tree", "llama_pass"},
    "tiny": {"policy", "tasks"},
    "generation": {"policy", "lora", "attention", "prefix_tree", "llama_pass", "shared_prefix"},
    "scoring": {"batching"},
    "sources": {"rollouts"},
    "models": {"sources"},
    "trainer": {"update", "evaluation", "collector"},
    "messages": {"trainer"},
    "doctor": {"checkup"},
    "runs": {"trainer", "evaluation", "update", "collector", "messages"},
}
EVERYONES = {"errors", "types"}
WITHOUT_CONFIG = {"losses", "advantages", "statistics", "schedules", "token_head"}
WITH_MLFLOW = {"tracking"}


def unit_of(path: Path) -> str:
    """Return what has a floor: a module, or the package that a file belongs to; empty for the root `__init__`."""
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
    """Return the imports that the floors forbid to `unit`."""
    wrong = []
    for name in sorted(names):
        root, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if root == "mlflow":
            allowed = unit in WITH_MLFLOW
        elif root == TOP:
            allowed = False
        elif root != PACKAGE or target == "__version__" or target == unit:
            allowed = True
        elif target in EVERYONES:
            allowed = unit != ""
        else:
            below = unit in FLOORS and target in FLOORS and FLOORS[target] < FLOORS[unit]
            allowed = (below or target in SAME_FLOOR.get(unit, ())) and not (
                unit in WITHOUT_CONFIG and target == "config"
            )
        if not allowed:
            wrong.append(f"{unit or '__init__'} imports {name}")
    return wrong


def _sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def _names(path: Path) -> set[str]:
    return imports(path.read_text(), ".".join(path.parent.relative_to(ROOT).parts))


EVERY_MODULE = pytest.mark.parametrize("path", _sources(PACKAGE), ids=lambda path: str(path.relative_to(ROOT)))
EVERY_COMMAND = pytest.mark.parametrize("path", _sources(TOP), ids=lambda path: path.name)


@EVERY_MODULE
def test_every_module_has_a_floor(path: Path) -> None:
    assert unit_of(path) in {"", *FLOORS}, f"give {unit_of(path)} a floor, here and in docs/architecture.md"


@EVERY_MODULE
def test_imports_only_go_down(path: Path) -> None:
    assert wrong_arrows(unit_of(path), _names(path)) == []


@EVERY_COMMAND
def test_commands_leave_mlflow_to_the_package(path: Path) -> None:
    assert not {name for name in _names(path) if name.split(".")[0] == "mlflow"}


@pytest.mark.parametrize("path", [*_sources(PACKAGE), *_sources(TOP)], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= (60 if path.is_relative_to(ROOT / TOP) else 320)


def test_the_package_is_found() -> None:
    found = {unit_of(path) for path in _sources(PACKAGE)}
    assert found >= {"errors", "types", "config", "losses", "tasks"}
    assert _sources(TOP)


@pytest.mark.parametrize(
    ("unit", "source"),
    [
        ("losses", "from grpo_mlflow.config import Config"),
        ("losses", "from grpo_mlflow import config"),
        ("statistics", "import grpo_mlflow.config.schema"),
        ("seeding", "from grpo_mlflow.losses import log_ratio"),
        ("config", "from grpo_mlflow.tasks import TASKS"),
        ("tasks", "from grpo_mlflow import policy"),
        ("policy", "def f():\n    from grpo_mlflow.tiny import build"),
        ("checkpoint", "from grpo_mlflow.rollouts import collect"),
        ("checkpoint", "import mlflow.artifacts"),
        ("runs", "import mlflow"),
        ("trainer", "if TYPE_CHECKING:\n    from grpo_mlflow.runs import train"),
        ("evaluation", "from . import trainer"),
        ("batching", "from .rollouts import collect"),
        ("tasks", "from entrypoints import train"),
        ("trainer", "from grpo_mlflow import not_a_module"),
        ("", "from grpo_mlflow import config"),
    ],
)
def test_a_wrong_import_is_seen(unit: str, source: str) -> None:
    assert len(wrong_arrows(unit, imports(source, PACKAGE))) == 1


@pytest.mark.parametrize(
    ("unit", "source"),
    [
        ("tiny", "from grpo_mlflow.policy import Policy"),
        ("generation", "from grpo_mlflow.generation.base import Generator"),
        ("trainer", "from grpo_mlflow import evaluation, losses, rollouts"),
        ("losses", "from grpo_mlflow.types import Group"),
        ("interrupts", "from types import FrameType"),
        ("statistics", "from statistics import NormalDist"),
        ("tracking", "import mlflow"),
        ("trainer", "from . import update"),
    ],
)
def test_a_right_import_passes(unit: str, source: str) -> None:
    assert wrong_arrows(unit, imports(source, PACKAGE)) == []
