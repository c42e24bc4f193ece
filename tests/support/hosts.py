"""Machines that see one another over a network and nothing else: network namespaces of a test's own."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import pytest

_NETWORK = 0x40000000  # CLONE_NEWNET of sched.h
_PREFIX = "10.77.0"


@dataclass(frozen=True, slots=True)
class Host:
    """A machine: its namespace, its address, and the name of its interface."""

    name: str
    address: str
    interface: str

    def words(self, command: Sequence[str]) -> list[str]:
        """Return a command that runs the given one on this machine."""
        return ["ip", "netns", "exec", self.name, *command]

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Let this thread, and the processes and threads that it starts, be on this machine inside the block."""
        with open("/proc/thread-self/ns/net") as own, open(f"/var/run/netns/{self.name}") as other:
            _enter(other.fileno())
            try:
                yield
            finally:
                _enter(own.fileno())


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """Make machines on one network, and end all that runs on them with the block; skip without the rights to."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root, and the program ip")
    tag = f"grpo{os.getpid()}"
    found = [Host(f"{tag}-{number}", f"{_PREFIX}.{number + 1}", f"v{number}") for number in range(count)]
    switch = f"{tag}-s"
    try:
        if (made := _ip("netns", "add", switch)).returncode:
            pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
        _do("-n", switch, "link", "add", "br0", "type", "bridge")
        _do("-n", switch, "link", "set", "br0", "up")
        for host in found:
            port = f"s{host.interface}"
            _do("netns", "add", host.name)
            _do(
                "link", "add", host.interface, "netns", host.name, "type", "veth", "peer", "name", port, "netns", switch
            )
            _do("-n", switch, "link", "set", port, "master", "br0", "up")
            _do("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.interface)
            for interface in ("lo", host.interface):
                _do("-n", host.name, "link", "set", interface, "up")
        yield found
    finally:
        for name in (*(host.name for host in found), switch):
            for pid in _ip("netns", "pids", name).stdout.split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            _ip("netns", "del", name)


def _enter(namespace: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.setns(namespace, _NETWORK):
        raise OSError(ctypes.get_errno(), "setns")


def _ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


def _do(*words: str) -> None:
    done = _ip(*words)
    if done.returncode:
        pytest.skip(f"ip {' '.join(words)}: {done.stderr.strip()}")
