"""YAML as people read it: `5e-6` is a number, `no` is a word, a key given twice is an error.

PyYAML follows YAML 1.1, where `5e-6` is text, `no` is false and `1:30` is ninety, and of a key given twice it silently
keeps the last. This loader takes the scalar rules of YAML 1.2's core schema instead.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from grpo_mlflow.errors import ConfigError


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012, set below


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012, set below

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                mark = node.value[place][0].start_mark
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is given twice", problem_mark=mark)
        return super().construct_mapping(node, deep)


def _add(tag: str, pattern: str, first: list[str]) -> None:
    for kind in (_Loader, _Dumper):
        kind.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), first)


_add("bool", r"^(true|True|TRUE|false|False|FALSE)$", list("tTfF"))
_add("int", r"^[-+]?[0-9]+$", list("-+0123456789"))
_NUMBER = r"^[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?$"
_add("float", rf"{_NUMBER}|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$", list("-+.0123456789"))
_add("null", r"^(~|null|Null|NULL|)$", ["~", "n", "N", ""])


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    if len(text) > 100:
        raise yaml.MarkedYAMLError(problem=f"a number of {len(text)} digits", problem_mark=node.start_mark)
    return int(text)


def _float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(str(loader.construct_scalar(node)).lower().replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)


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
