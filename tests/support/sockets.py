"""What the kernel says about this machine's connections and this process's threads and files."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

_ESTABLISHED = "01"


def established(port: int) -> int:
    """Established connections whose local port is ``port``: the server's side, so each is counted once.

    By their addresses, for the kernel writes its table in pieces: what moves between two of them while
    connections come and go is listed twice (seen: nine lines, seven connections).
    """
    return len(
        {
            (table, *entry[1:3])
            for table in ("/proc/net/tcp", "/proc/net/tcp6")
            for entry in _entries(Path(table))
            if entry[3] == _ESTABLISHED and int(entry[1].rpartition(":")[2], 16) == port
        }
    )


def client_ports(port: int) -> set[int]:
    """The clients' ports of this machine's connections to ``port``, those closed a minute ago included."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for entry in _entries(Path(table)):
            local, remote = (int(address.rpartition(":")[2], 16) for address in entry[1:3])
            # What listens has no remote port.
            if local == port and remote:
                found.add(remote)
            elif remote == port:
                found.add(local)
    return found


def open_files() -> int:
    """File descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


def open_sockets() -> int:
    """File descriptors of this process that are sockets."""
    return sum(_is_socket(name) for name in os.listdir("/proc/self/fd"))


def threads() -> list[str]:
    """Names of this process's running threads."""
    return sorted(thread.name for thread in threading.enumerate())


def settles(read: Callable[[], int], expected: int, *, within_seconds: float = 5.0) -> int:
    """The value once it is ``expected``, or the last one seen: kernels and threads take their time."""
    deadline = time.monotonic() + within_seconds
    while (value := read()) != expected and time.monotonic() < deadline:
        time.sleep(0.02)
    return value


def _entries(table: Path) -> list[list[str]]:
    try:
        lines = table.read_text().splitlines()[1:]
    except FileNotFoundError:
        return []
    return [line.split() for line in lines]


def _is_socket(descriptor: str) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:")
    except FileNotFoundError:
        return False
