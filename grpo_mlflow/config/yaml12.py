"""YAML as people read it: `5e-6` is a number, `no` is a word, a key given twice is an error.

PyYAML follows YAML 1.1, where `5e-6` is text, `no` is false and `1:30` is ninety, and of a key given twice it silently
keeps the last. This loader takes the scalar rules of YAML 1.2's core schema instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from typing import Any

import yaml

from grpo_mlflow.errors import ConfigError

_MOST_VALUES = 20_000  # far more than any config has, and a second's work


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012, set below


class _Loader(yaml.SafeLoader):
    _count = 0
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012, set below
    # Those of the core schema: a tag such as !!timestamp, written out, is refused.
    yaml_constructors = {  # noqa: RUF012
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[Any]()
        for written, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            key = self.construct_object(written, deep=True)
            if not isinstance(key, Hashable):
                break  # refused below
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is given twice", problem_mark=written.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._count += 1
        if self._count > _MOST_VALUES:
            raise yaml.MarkedYAMLError(problem=f"more than {_MOST_VALUES} values", problem_mark=self.get_mark())
        node: yaml.Node | None = super().compose_node(parent, index)
        return node

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _require_small(node)
        return node


def _add(tag: str, pattern: str, first: list[str]) -> None:
    for kind in (_Loader, _Dumper):
        kind.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), first)


_add("bool", r"^(true|True|TRUE|false|False|FALSE)$", list("tTfF"))
_add("int", r"^[-+]?[0-9]+$", list("-+0123456789"))
_NUMBER = r"^[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?$"
_add("float", rf"{_NUMBER}|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$", list("-+.0123456789"))
_add("null", r"^(~|null|Null|NULL|)$", ["~", "n", "N", ""])


def _require_small(root: yaml.Node) -> None:
    """Refuse a document that its aliases make huge: nine lines of nine aliases each stand for a billion values.

    A shared value costs nothing here, but whatever walks through the config, compares it or writes it meets each copy.
    """
    sizes: dict[int, int] = {}
    open_ones = set[int]()

    def size(node: yaml.Node) -> int:
        if isinstance(node, yaml.ScalarNode):
            return 1
        if id(node) in open_ones:
            raise yaml.MarkedYAMLError(problem="an alias of what it stands in", problem_mark=node.start_mark)
        if id(node) not in sizes:
            open_ones.add(id(node))
            parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
            sizes[id(node)] = 1 + sum(size(part) for part in parts)
            open_ones.remove(id(node))
        return sizes[id(node)]

    if (found := size(root)) > _MOST_VALUES:
        raise yaml.MarkedYAMLError(problem=f"its aliases make {found} values of it", problem_mark=root.start_mark)


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    if len(text) > 100:
        raise yaml.MarkedYAMLError(problem=f"a number of {len(text)} digits", problem_mark=node.start_mark)
    return int(text)


def _float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(str(loader.construct_scalar(node)).lower().replace(".inf", "inf").replace(".nan", "nan"))


def _bool(loader: _Loader, node: yaml.ScalarNode) -> bool:
    return {"true": True, "false": False}[str(loader.construct_scalar(node)).lower()]


def _tagged(make: Callable[[_Loader, yaml.ScalarNode], Any]) -> Callable[[_Loader, yaml.ScalarNode], Any]:
    """Return a constructor that refuses what only an explicit tag brings to it, such as `!!int x`."""

    def made(loader: _Loader, node: yaml.ScalarNode) -> Any:
        try:
            return make(loader, node)
        except (ValueError, KeyError):
            kind = node.tag.rpartition(":")[2]
            raise yaml.MarkedYAMLError(problem=f"no {kind}", problem_mark=node.start_mark) from None

    return made


for _name, _make in (("int", _int), ("float", _float), ("bool", _bool)):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_name}", _tagged(_make))


def load(text: str, where: str) -> Any:
    """Parse one YAML document.

    Raises:
        ConfigError: the text is not valid YAML; the line says where.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{where}{line}: not valid YAML: {error.problem}") from None
    except RecursionError:
        raise ConfigError(f"{where}: not valid YAML: nested too deeply") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def dump(value: Any, flow: bool = False) -> str:
    """Return text that `load` reads back to an equal value; `flow` puts it on one line."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=flow, width=10**9)
    return text


def inline(value: Any) -> str:
    """Return a value on one line, as a file or an override has it."""
    return dump(value, flow=True).removesuffix("...\n").strip()
