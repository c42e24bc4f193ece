"""What commands are called in this place, for those that messages show, and where they were typed."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path


def program(name: str = "grpo", module: str = "grpo_mlflow") -> str:
    """Return what starts a program in a shell: its name where that is the one of this interpreter, else its path."""
    here = Path(sys.executable).with_name(name)
    if not here.exists():  # not installed: run from its folder
        return f"{shlex.quote(sys.executable)} -m {module}"
    found = shutil.which(name)
    return name if found and here.samefile(found) else shlex.quote(str(here))


def typed_in() -> Path:
    """Return the folder where the command was typed: `mlflow run` starts a project in that of the project."""
    here = Path.cwd()
    if "MLFLOW_RUN_ID" not in os.environ:
        return here
    import psutil  # half as long to import as all that a wrong setting needs

    for above in psutil.Process().parents():
        try:
            if Path(above.name()).stem.startswith(("python", "mlflow")):
                return Path(above.cwd())
        except psutil.Error:  # of another user, or gone
            break
    return here
