"""The JSON schema of config files, for editors: `settings.schema.json` in this folder holds what `text` returns."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_mlflow.config import describe, layers

PATH = Path(__file__).with_name("settings.schema.json")
# In the order in which a part has them; the rest of what pydantic writes is left out.
_KEPT = (
    *("type", "description", "const", "enum", "pattern", "examples", "anyOf", "minLength", "maxLength"),
    *("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "minItems", "maxItems", "prefixItems", "items"),
    *("additionalProperties", "default"),
)
_LIMITS = {"minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"}


def text() -> str:
    """Return the schema as JSON."""
    base = {"type": "string", "description": "preset or file to start from", "examples": layers.presets()}
    whole = _section("", "Settings of grpo_mlflow.")
    whole["properties"] = {"base": base} | whole["properties"]
    whole["properties"]["resume"] = {"type": "null", "description": "run to continue: on the command line only"}
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema"} | whole, indent=1) + "\n"


def _section(name: str, about: str) -> dict[str, Any]:
    settings = {key.rpartition(".")[2]: _clean(describe.part(key)) for key in describe.inside(name)}
    sections = describe.sections().items()
    below = {
        each.rpartition(".")[2]: _section(each, text) for each, text in sections if each.rpartition(".")[0] == name
    }
    return {"type": "object", "description": about, "additionalProperties": False, "properties": settings | below}


def _clean(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return a part of pydantic's schema the same in all its versions; a reference, to any JSON, allows all."""
    found: dict[str, Any] = {}
    for key in (key for key in _KEPT if key in part):
        value = part[key]
        if key in ("anyOf", "prefixItems"):
            found[key] = [_clean(each) for each in value]
        elif key == "items" or (key == "additionalProperties" and isinstance(value, Mapping)):
            found[key] = _clean(value)
        elif key in _LIMITS and isinstance(value, float) and value.is_integer():  # some versions write 0.0 for 0
            found[key] = int(value)
        elif not (key == "enum" and "const" in part):
            found[key] = value
    return found
