"""What the command is called in this place, for the commands that messages show."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path


def program() -> str:
    """Return what starts this program in a shell: `grpo` where that is the one of this interpreter, else its path."""
    here = Path(sys.executable).with_name("grpo")
    if not here.exists():  # not installed: run from its folder
        return f"{shlex.quote(sys.executable)} -m grpo_mlflow"
    found = shutil.which("grpo")
    return "grpo" if found and here.samefile(found) else shlex.quote(str(here))
