"""Memory that is freed and taken again costs no page faults once it is kept."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import resource
import sys
import torch
from grpo_mlflow.allocator import keep_freed

if sys.argv[1] == "kept":
    keep_freed()

def use():
    for _ in range(20):
        first, second = (torch.ones(size << 20, dtype=torch.uint8) for size in (4, 40))
        del first, second

use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(which: str) -> int:
    found = subprocess.run([sys.executable, "-c", CODE, which], capture_output=True, text=True, check=True)
    return int(found.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries decide for themselves")
def test_freed_memory_is_taken_again_without_faults() -> None:
    assert faults("as it is") > 20 * (40 << 20) / 4096 / 600  # even with huge pages
    assert faults("kept") < 100
