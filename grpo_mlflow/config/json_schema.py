"""The JSON schema of config files, for editors: `settings.schema.json` in this folder holds what `text` returns."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_mlflow.config import describe, layers

PATH = Path(__file__).with_name("settings.schema.json")
_KEPT = {
    *(
        "type",
        "description",
        "default",
        "enum",
        "const",
        "examples",
        "pattern",
        "anyOf",
        "$ref",
        "minLength",
        "maxLength",
    ),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minItems", "maxItems", "items", "prefixItems"),
    *("additionalProperties", "properties", "required"),
}


def text() -> str:
    """Return the schema as JSON."""
    whole = describe.schema()
    properties = {name: _clean(part) for name, part in whole["properties"].items()}
    properties["resume"] = {"type": "null", "description": "given on the command line only"}
    base = {"type": "string", "description": "preset or file to start from", "examples": layers.presets()}
    found = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Settings of grpo_mlflow",
        "type": "object",
        "additionalProperties": False,
        "properties": {"base": base, **properties},
        "$defs": {name: _clean(part) for name, part in whole["$defs"].items()},
    }
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def _clean(part: Any) -> Any:
    """Return a part of pydantic's schema without what is ours (`Section`) and what repeats names."""
    if not isinstance(part, Mapping):
        return part
    found: dict[str, Any] = {}
    for key, value in part.items():
        if key == "properties":
            found[key] = {name: _clean(each) for name, each in value.items()}
        elif key in ("anyOf", "prefixItems"):
            found[key] = [_clean(each) for each in value]
        elif key in ("items", "additionalProperties"):
            found[key] = _clean(value)
        elif key in _KEPT and not (
            key == "default" and "$ref" in part
        ):  # a section's: each of its settings has its own
            found[key] = value
    return found
