"""A check of values by the part of JSON Schema (draft 2020-12) that our schema uses; any other keyword is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_TYPES: dict[str, type | tuple[type, ...]] = {
    **{"null": type(None), "boolean": bool, "string": str, "array": list, "object": dict},
    **{"integer": int, "number": (int, float)},
}
_SILENT = {"description", "default", "examples", "$schema"}


def errors(value: Any, schema: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """Yield what in a value a schema refuses."""
    for key, told in schema.items():
        if key not in _SILENT:
            yield from (f"{where or '.'}: {error}" for error in _RULES[key](value, told, schema))
    if "anyOf" in schema and all(any(errors(value, each)) for each in schema["anyOf"]):
        yield f"{where}: {value!r} is none of {schema['anyOf']}"
    if isinstance(value, dict):
        for name, inner in value.items():
            told = schema.get("properties", {}).get(name, schema.get("additionalProperties", True))
            if isinstance(told, dict):
                yield from errors(inner, told, f"{where}.{name}")
            elif not told:
                yield f"{where}.{name}: unknown"
    if isinstance(value, list):
        fixed = schema.get("prefixItems", [])
        for place, inner in enumerate(value):
            told = fixed[place] if place < len(fixed) else schema.get("items", {})
            yield from errors(inner, told, f"{where}[{place}]")


def _type(value: Any, told: str, schema: Any) -> Iterator[str]:
    if not isinstance(value, _TYPES[told]) or (isinstance(value, bool) and told in ("integer", "number")):
        yield f"{value!r} is no {told}"


def _if(kind: type | tuple[type, ...], refused: Any) -> Any:
    def rule(value: Any, told: Any, schema: Any) -> Iterator[str]:
        if isinstance(value, kind) and refused(value, told):
            yield f"{value!r}: not {told!r}"

    return rule


def _elsewhere(value: Any, told: Any, schema: Any) -> Iterator[str]:
    yield from ()


_RULES: dict[str, Any] = {
    "type": _type,
    "enum": _if(object, lambda value, told: value not in told),
    "const": _if(object, lambda value, told: value != told),
    "pattern": _if(str, lambda value, told: re.search(told, value) is None),
    "minLength": _if(str, lambda value, told: len(value) < told),
    "minItems": _if(list, lambda value, told: len(value) < told),
    "maxItems": _if(list, lambda value, told: len(value) > told),
    "minimum": _if((int, float), lambda value, told: value < told),
    "maximum": _if((int, float), lambda value, told: value > told),
    "exclusiveMinimum": _if((int, float), lambda value, told: value <= told),
    "exclusiveMaximum": _if((int, float), lambda value, told: value >= told),
    **dict.fromkeys(("anyOf", "items", "prefixItems", "properties", "additionalProperties"), _elsewhere),
}
