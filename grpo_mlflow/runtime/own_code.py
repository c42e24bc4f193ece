"""Code of the user's own, named in a setting as `python:MODULE:NAME`."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any, Literal

from grpo_mlflow.errors import ConfigError, one_line


def load(key: str, value: str, kind: Literal["class", "function"]) -> Any:
    """Return what `value` names; its module is imported from the current folder or PYTHONPATH.

    Raises:
        ConfigError: it cannot be imported, or has no such class or function.
    """
    _, module, name = value.split(":")
    start = f"{key} = {value!r}"
    try:
        if os.getcwd() not in sys.path:  # a console script has its own folder there instead
            sys.path.insert(0, os.getcwd())
        found = getattr(importlib.import_module(module), name, None)
    except (Exception, SystemExit) as error:  # whatever the user's module does when it is imported
        raise ConfigError(f"{start}: {module} cannot be imported: {type(error).__name__}: {one_line(error)}") from error
    if not callable(found) or isinstance(found, type) != (kind == "class"):
        raise ConfigError(f"{start}: {module} has no {kind} {name}; allowed: the name of a {kind} in it")
    return found
