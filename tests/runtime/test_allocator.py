"""Memory that is freed and taken again costs no page faults once it is kept."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CODE = """
import ctypes
import resource
import sys
from grpo_mlflow.runtime.allocator import keep_freed

if sys.argv[1] == "kept":
    keep_freed()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
places = [ctypes.c_void_p() for _ in range(32)]

def use():
    for place in places:
        place.value = libc.malloc(ctypes.c_size_t(4 << 20))
        libc.memset(place, 1, ctypes.c_size_t(4 << 20))
    for place in places:
        libc.free(place)

use()
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(which: str) -> int:
    found = subprocess.run([sys.executable, "-c", CODE, which], capture_output=True, text=True, check=True)
    return int(found.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries decide for themselves")
def test_freed_memory_is_taken_again_without_faults() -> None:
    assert faults("as it is") > 10 * 32  # one for each block, even with huge pages
    assert faults("kept") < 20
